# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: MIR beside the loss, and the distance of every layer over the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from mir_callback.analysis.load import noted_losses, read_run
from mir_callback.analysis.page.views import DISTANCE, over_layers
from mir_callback.errors import HistoryError

_MIR_COLOUR = "#1f5fa8"
_LOSS_COLOUR = "#b0632a"
_BAND = 1.96  # standard errors: 95 % of a normal distribution


def plot_run(
    history: str | Path | Sequence[Mapping[str, Any]], log_history: Sequence[Mapping[str, Any]], path: str | Path
) -> Path:
    """Draw MIR and loss over steps above a layer x step heat map of the per-layer distances.

    Args:
        history: records of evaluations (`MIRCallback.history`), or where they are: a run's output folder, a history
            file, a checkpoint or a wandb run.
        log_history: `trainer.state.log_history`, for the training loss; if it is empty, the loss is that which was
            found with the records.
        path: image file to write; the suffix chooses the format.

    Returns:
        The path written.

    Raises:
        HistoryError: no evaluation with a finite MIR, or no run to be read.

    Ranks: rank 0 only.
    """
    if isinstance(history, (str, Path)):
        run = read_run(history)
        history, found = run.records, run.losses
    else:
        found = noted_losses(history)
    losses = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry] or found
    measured = [record for record in history if record["mir"] is not None]
    if not measured:
        raise HistoryError("history must hold at least one evaluation with a finite MIR to draw, got none")
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    curve, heat = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _draw_curve(curve, measured, losses)
    _draw_layers(figure, heat, measured)
    figure.savefig(path, dpi=150)
    return Path(path)


def _draw_curve(axes: Axes, measured: Sequence[Mapping[str, Any]], losses: Sequence[tuple[int, float]]) -> None:
    steps = [record["step"] for record in measured]
    axes.plot(steps, [record["mir"] for record in measured], "o-", color=_MIR_COLOUR, markersize=3, label="MIR")
    errors = [record["mir_se"] for record in measured if record.get("mir_se") is not None]
    if len(errors) == len(measured):
        values, reach = np.array([record["mir"] for record in measured]), _BAND * np.array(errors)
        axes.fill_between(steps, values - reach, values + reach, color=_MIR_COLOUR, alpha=0.15, linewidth=0)
    axes.set_ylabel("MIR (lower is better aligned)", color=_MIR_COLOUR)
    axes.grid(alpha=0.3)
    if losses:
        beside = axes.twinx()
        beside.plot(*zip(*losses, strict=True), color=_LOSS_COLOUR, linewidth=1, alpha=0.8)
        beside.set_yscale("log")
        _plain_numbers(beside)
        beside.set_ylabel("training loss", color=_LOSS_COLOUR)
    if measured[-1].get("verdict") == "plateau":
        axes.axvline(steps[-1], color="black", linestyle=":", linewidth=1)
        axes.annotate(
            "plateau: stopped",
            (steps[-1], axes.get_ylim()[1]),
            xytext=(-4, -12),
            textcoords="offset points",
            ha="right",
            fontsize=9,
        )
    axes.set_title("Modality Integration Rate during pre-training")


def _draw_layers(figure: Figure, axes: Axes, measured: Sequence[Mapping[str, Any]]) -> None:
    steps = np.array([record["step"] for record in measured], dtype=float)
    layers = over_layers(DISTANCE, [dict(record) for record in measured])
    if not len(layers):
        axes.set_xlabel("optimizer step")
        axes.text(0.5, 0.5, "no distances of the layers in these records", transform=axes.transAxes, ha="center")
        return
    visible = layers[layers > 0]
    norm = LogNorm(vmin=visible.min(), vmax=visible.max()) if visible.size and visible.min() < visible.max() else None
    shown = np.ma.masked_less_equal(np.ma.masked_invalid(layers), 0.0) if norm else np.ma.masked_invalid(layers)
    mesh = axes.pcolormesh(_edges(steps), np.arange(len(layers) + 1) + 0.5, shown, norm=norm, cmap="viridis")
    # An inset, because a colour bar beside the axes would lie outside the labels of the loss, far from its picture.
    bar = figure.colorbar(mesh, cax=axes.inset_axes((1.012, 0.0, 0.018, 1.0)), label="distance FD")
    if norm is not None:
        _plain_numbers(bar.ax)
    axes.set_yticks(np.arange(1, len(layers) + 1, max(1, len(layers) // 8)))
    axes.set_ylabel("decoder layer")
    axes.set_xlabel("optimizer step")


def _plain_numbers(axes: Axes) -> None:
    """Write 20 and not 2 x 10^1 beside a logarithmic axis."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _edges(steps: np.ndarray) -> np.ndarray:
    """Cell borders half way between steps; a single step gets a cell of width one."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middle = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[steps[0] - (middle[0] - steps[0])], middle, [steps[-1] + (steps[-1] - middle[-1])]])
