# SPDX-License-Identifier: Apache-2.0
"""Plot a run (MIR, loss, distance of each layer), and draw a contact sheet of a probe."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mir_callback.analysis.load import noted_losses, read_run
from mir_callback.analysis.samples import draw_images, write_out
from mir_callback.analysis.statistics import BAND
from mir_callback.errors import ConfigError, HistoryError
from mir_callback.probe.probe import Probe
from mir_callback.record import STOPPING, EvalRecord, as_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mir_callback.probe.batches import TokenCounts

_MIR_COLOUR = "#1f5fa8"
_LOSS_COLOUR = "#b0632a"

_IMAGE = (224, 168)
_MARGIN = 12
_FONT_SIZE = 12
_LINE = 16
_TEXT_LINES = 4
_CHARACTERS = 36  # of a line of text in the width of an image
_CELL = (_IMAGE[0] + 2 * _MARGIN, _IMAGE[1] + (_TEXT_LINES + 2) * _LINE + 2 * _MARGIN)
_LEAST_WIDTH = 560  # of the heading
_INK, _FAINT, _PAPER = "#222222", "#777777", "#ffffff"


def plot_run(
    history: str | Path | Sequence[EvalRecord | Mapping[str, Any]],
    log_history: Sequence[Mapping[str, Any]],
    path: str | Path,
) -> Path:
    """Plot MIR and loss over steps, above a heat map of the distances by layer and step.

    Args:
        history: records (`MIRCallback.history`), or a run's output folder, history file or checkpoint.
        log_history: `trainer.state.log_history`, for the training loss; if empty, the losses in the history or in the
            Trainer's state are used.
        path: image file to write; its suffix sets the format.

    Returns:
        ``path``.

    Raises:
        HistoryError: there is no run at ``history``, or no evaluation has a MIR.

    Ranks: rank 0 only.

    Example:
        ```
        plot_run("runs/demo", [], "mir.png")
        plot_run(callback.history, trainer.state.log_history, "mir.png")
        ```
    """
    from matplotlib.figure import Figure

    if isinstance(history, (str, Path)):
        run = read_run(history)
        records, found = list(run.records), run.losses
    else:
        records = as_records(history)
        found = noted_losses(records)
    losses = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry] or found
    measured = [record for record in records if record.mir is not None]
    if not measured:
        raise HistoryError("Nothing to plot: no evaluation has a MIR.")
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    curve, heat = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _draw_curve(curve, measured, losses)
    _draw_layers(figure, heat, measured)
    figure.savefig(path, dpi=150)
    return Path(path)


def _draw_curve(axes: Axes, measured: Sequence[EvalRecord], losses: Sequence[tuple[int, float]]) -> None:
    steps = [record.step for record in measured]
    values, errors = (np.array([record[name] for record in measured], dtype=float) for name in ("mir", "mir_se"))
    axes.plot(steps, values, "o-", color=_MIR_COLOUR, markersize=3, label="MIR")
    if np.isfinite(errors).all():
        low, high = values - BAND * errors, values + BAND * errors
        axes.fill_between(steps, low, high, color=_MIR_COLOUR, alpha=0.15, linewidth=0)
    axes.set_ylabel("MIR (lower is better aligned)", color=_MIR_COLOUR)
    axes.grid(alpha=0.3)
    if losses:
        beside = axes.twinx()
        beside.plot(*zip(*losses, strict=True), color=_LOSS_COLOUR, linewidth=1, alpha=0.8)
        beside.set_yscale("log")
        _write_plain_numbers(beside)
        beside.set_ylabel("training loss", color=_LOSS_COLOUR)
    if measured[-1].verdict == STOPPING:
        axes.axvline(steps[-1], color="black", linestyle=":", linewidth=1)
        top = (steps[-1], axes.get_ylim()[1])
        axes.annotate("plateau: stopped", top, (-4, -12), textcoords="offset points", ha="right", fontsize=9)
    axes.set_title("Modality Integration Rate during pre-training")


def _draw_layers(figure: Figure, axes: Axes, measured: Sequence[EvalRecord]) -> None:
    from matplotlib.colors import LogNorm

    from mir_callback.analysis.page.charts import find_edges
    from mir_callback.analysis.page.views import DISTANCE, stack_layers

    layers = stack_layers(DISTANCE, measured)
    axes.set_xlabel("optimizer step")
    if not len(layers):
        axes.text(0.5, 0.5, "these records have no per-layer distances", transform=axes.transAxes, ha="center")
        return
    visible = layers[layers > 0]
    norm = LogNorm(vmin=visible.min(), vmax=visible.max()) if visible.size and visible.min() < visible.max() else None
    shown = np.ma.masked_less_equal(np.ma.masked_invalid(layers), 0.0) if norm else np.ma.masked_invalid(layers)
    steps = [record.step for record in measured]
    ends = (-math.inf, math.inf) if len(steps) > 1 else (steps[0] - 0.5, steps[0] + 0.5)
    edges = find_edges(steps, *ends)
    mesh = axes.pcolormesh(edges, np.arange(len(layers) + 1) + 0.5, shown, norm=norm, cmap="viridis")
    # An inset: beside the axes, the labels of the loss would be between colour bar and heat map.
    bar = figure.colorbar(mesh, cax=axes.inset_axes((1.012, 0.0, 0.018, 1.0)), label="distance FD")
    if norm is not None:
        _write_plain_numbers(bar.ax)
    axes.set_yticks(np.arange(1, len(layers) + 1, max(1, len(layers) // 8)))
    axes.set_ylabel("decoder layer")


def _write_plain_numbers(axes: Axes) -> None:
    """Label a logarithmic axis with 20 instead of 2 x 10^1."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_sheet(
    probe: Probe, path: str | Path, counts: TokenCounts | None = None, *, columns: int | None = None
) -> Path:
    """Draw a contact sheet of a probe: the images of each sample with the beginning of its text.

    Args:
        probe: the samples.
        path: image file to write, e.g. `probe.png`; its suffix sets the format, and its folder is created.
        counts: token counts to write below the images.
        columns: images per row; by default such that the sheet is a little wider than high.

    Returns:
        The path written.

    Raises:
        ConfigError: the suffix is not that of an image format, or the file cannot be written.

    Ranks: rank 0 only.

    Example:
        ``draw_sheet(Probe.load("probe.zip"), "probe.png")``
    """
    path = Path(os.path.expanduser(path))
    check_sheet_path(path)
    across = min(len(probe), columns or max(4, round((len(probe) * 1.6) ** 0.5)))
    down = -(-len(probe) // across)
    title = 3 * _LINE
    sheet = Image.new("RGB", (max(across * _CELL[0], _LEAST_WIDTH), down * _CELL[1] + title), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    heading = f"probe {probe.fingerprint}: {len(probe)} samples, texts up to {probe.max_text_tokens} tokens"
    pen.text((_MARGIN, _LINE), heading, fill=_INK, font=ImageFont.load_default(_FONT_SIZE + 4))
    for index, sample in enumerate(probe.samples):
        left, top = index % across * _CELL[0] + _MARGIN, index // across * _CELL[1] + title
        image = draw_images(sample, _IMAGE)
        if image is not None:
            sheet.paste(image, (left + (_IMAGE[0] - image.width) // 2, top + _IMAGE[1] - image.height))
        top += _IMAGE[1] + _LINE // 2
        text = _wrap(write_out(sample), _TEXT_LINES)
        for faint, line in enumerate([_caption(index, counts), *_wrap(sample.name, 1), *text]):
            pen.text((left, top), line, fill=_FAINT if faint < 2 else _INK, font=font)
            top += _LINE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except OSError as error:
        raise ConfigError(f"Could not write the contact sheet to {path}: {error.strerror or error}.") from error
    return path


def check_sheet_path(path: str | Path) -> None:
    """ConfigError unless ``path`` has the suffix of an image format."""
    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"The contact sheet {path} has no suffix of an image format. Use e.g. {Path(path).stem}.png.")


def _caption(index: int, counts: TokenCounts | None) -> str:
    if counts is None:
        return f"{index}"
    vision = "" if counts.vision is None else f"{counts.vision[index]} vision, "
    return f"{index}: {vision}{counts.text[index]} text tokens"


def _wrap(text: str, lines: int) -> list[str]:
    return textwrap.wrap(text, _CHARACTERS, max_lines=lines, placeholder=" ...") or [""]
