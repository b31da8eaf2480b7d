# SPDX-License-Identifier: Apache-2.0
"""The page's charts: MIR, verdicts, loss and layers over the run, and profiles over the layers."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from markupsafe import Markup

from mir_callback.analysis.page import charts, views
from mir_callback.analysis.page.charts import Scale, Ticks, fit_scale, format_value
from mir_callback.analysis.page.views import WOULD_STOP, Axis, Quantity, RunView, read_verdict
from mir_callback.analysis.statistics import BAND
from mir_callback.record import STOPPING, EvalRecord

_COMPANIONS = {
    "scale_free_mir": "scale-free MIR (lower is better aligned)",
    "vision_gain": "vision gain, nats per token (higher: images are used more)",
}
_MISSING = 2**16 - 1  # the code of a layer that has no value; those of values are 0 to 65534


@dataclass(frozen=True)
class Panel:
    """One coordinate system, which page.html lays out."""

    title: str
    says: str  # the picture in words
    shapes: Sequence[tuple[int, Markup]] = ()  # SVG with the number of its run, the lowest first
    over: Sequence[tuple[int, Markup]] = ()  # HTML over it, alike
    y_ticks: Ticks = field(default_factory=list)
    x_ticks: Ticks = field(default_factory=list)
    size: str = "medium"  # class name, which sets the height
    run: int | None = None  # the run that it shows alone


def scale_axes(runs: Sequence[RunView]) -> list[tuple[Axis, Scale]]:
    """The horizontal axes of the runs' evaluations, the one that is drawn first; the script changes to the others."""
    found = []
    for axis in views.find_axes(runs):
        values = np.concatenate([axis.read(run.records if axis.field == "step" else run.measured) for run in runs])
        # The ends a little outside the outermost values, so that their dots and columns are whole.
        found.append((axis, fit_scale(values.tolist(), "log" if axis.name == "log" else "linear", padding=0.02)))
    return found


def draw_timeline(runs: Sequence[RunView], x: Scale) -> dict[str, list[Panel]]:
    """The panels over the steps by what they show, from the top: MIR, verdicts, second opinions, loss, layers."""
    ruled = any(record.verdict for run in runs for record in run.records)
    lossy = any(run.loss_points for run in runs) or any(record.probe_loss for run in runs for record in run.measured)
    return {
        "mir": [_draw_mir(runs, x)],
        "verdicts": [_draw_ribbon(number, run, x) for number, run in enumerate(runs)] if ruled else [],
        "companions": [
            _draw_companion(runs, x, name, title)
            for name, title in _COMPANIONS.items()
            if any(record[name] is not None for run in runs for record in run.measured)
        ],
        "loss": [_draw_loss(runs, x)] if lossy else [],
        "layers": [_frame_layers(number, run, runs) for number, run in enumerate(runs)],
    }


def _draw_mir(runs: Sequence[RunView], x: Scale) -> Panel:
    values = [np.array([record.mir for record in run.measured], dtype=float) for run in runs]
    errors = [BAND * np.array([record.mir_se for record in run.measured], dtype=float) for run in runs]
    reach = [mir + side * np.nan_to_num(error) for mir, error in zip(values, errors, strict=True) for side in (-1, 1)]
    y = fit_scale(np.concatenate(reach).tolist())
    y = Scale(y.low - 0.07 * (y.high - y.low), y.high)  # room for the words below the lowest value
    shapes, over, said = [], [], []
    for number, (run, mir, error) in enumerate(zip(runs, values, errors, strict=True)):
        at, heights = x(_steps(run.measured)), y(mir)
        dots = charts.draw_dots(at, heights, "dot small" if len(mir) > 100 else "dot")
        band = charts.draw_band(at, y(mir - error), y(mir + error))
        marks, words = _draw_marks(run, x, y, alone=len(runs) == 1)
        shapes.append((number, band + charts.draw_line(at, heights) + dots + marks))
        over.append((number, words))
        first, peak, best, last = (f"{record.mir:.3f} at step {record.step}" for record in run.moments.values())
        said.append(f"{run.name}: {first}, highest {peak}, lowest {best}, {last}")
    title, says = "MIR (lower is better aligned)", f"MIR over the run. {'; '.join(said)}"
    return Panel(title, says, shapes, over, y.ticks(6), x.ticks(7), "tall")


def _draw_marks(run: RunView, x: Scale, y: Scale, alone: bool) -> tuple[Markup, Markup]:
    """What stands out: the best value, where the rule would stop, new stages, and evaluations that failed."""
    best = run.moments["best"]
    at, height = x([best.step]), y(np.array([best.mir], dtype=float))
    shapes = [charts.draw_dots(at, height, f"dot best-{part}") for part in ("outer", "inner")]
    words = [charts.draw_note(float(at[0]), float(height[0]), f"lowest {best.mir:.3f}", "below")]
    stops = [record for record in run.measured if read_verdict(record) in (STOPPING, WOULD_STOP)]
    stages = [(a, b) for a, b in pairwise(r for r in run.measured if r.stage is not None) if a.stage != b.stage]
    for record in stops[:1]:
        left = float(x([record.step])[0])
        shapes.append(charts.draw_line([left, left], [0, 1], "stop"))
        words.append(charts.draw_note(left, 1.0, f"{read_verdict(record)}, step {record.step}", "top"))
    for _, record in stages:
        left = float(x([record.step])[0])
        shapes.append(charts.draw_line([left, left], [0, 1], "stage"))
        words.append(charts.draw_note(left, 0.93, f"other parameters train, step {record.step}", "top faint"))
    cross = Markup('<span class="cross-mark" style="left:{:.2%}" title="step {}: {}">\N{MULTIPLICATION SIGN}</span>')
    crosses = [
        cross.format(left, record.step, record.error or "failed")
        for left, record in zip(x(_steps(run.failed)), run.failed, strict=True)
    ]
    return Markup("").join(shapes), Markup("").join([*(words if alone else []), *crosses])


def _draw_ribbon(number: int, run: RunView, x: Scale) -> Panel:
    """A ribbon of the rule's verdicts."""
    edges, bars, left = charts.find_edges(x(_steps(run.records))), [], 0
    for verdict, group in groupby(run.records, read_verdict):
        span = list(group)
        right = left + len(span)
        if verdict:
            title = f"{verdict}, steps {span[0].step} to {span[-1].step}: {span[-1].reason or ''}"
            css = views.VERDICTS.get(verdict, ("other", ""))[0]
            bars.append(charts.draw_bar(edges[left], edges[right], css, title))
        left = right
    says = f"Verdicts of the stop rule on {run.name}; the last one: {read_verdict(run.records[-1]) or 'none'}"
    return Panel("", says, [(number, Markup("").join(bars))], size="ribbon", run=number)


def _draw_companion(runs: Sequence[RunView], x: Scale, name: str, title: str) -> Panel:
    """A field of the records over the run, with a band where its standard error is known."""
    curves = []
    for run in runs:
        known = [record for record in run.measured if record[name] is not None]
        errors = [getattr(record, f"{name}_se", None) for record in known]
        values = np.array([record[name] for record in known], dtype=float)
        curves.append((x(_steps(known)), values, BAND * np.array(errors, dtype=float)))
    reach = [values + side * np.nan_to_num(error) for _, values, error in curves for side in (-1, 1)]
    y, shapes, said = fit_scale(np.concatenate(reach).tolist()), [], []
    for number, (run, (at, values, error)) in enumerate(zip(runs, curves, strict=True)):
        if len(values):
            band, dots = charts.draw_band(at, y(values - error), y(values + error)), charts.draw_dots(at, y(values))
            shapes.append((number, band + charts.draw_line(at, y(values)) + dots))
            said.append(f"{run.name}: {format_value(values[0])} to {format_value(values[-1])}")
    return Panel(title, f"{title} over the run. {'; '.join(said)}", shapes, (), y.ticks(4), x.ticks(7))


def _draw_loss(runs: Sequence[RunView], x: Scale) -> Panel:
    on_probe = [[(r.step, r.probe_loss) for r in run.measured if r.probe_loss is not None] for run in runs]
    y = fit_scale((loss for points in [*(run.loss_points for run in runs), *on_probe] for _, loss in points), "log")
    shapes = []
    for number, (run, probed) in enumerate(zip(runs, on_probe, strict=True)):
        for points, css in ((run.loss_points, "line loss"), (probed, "line loss on-probe")):
            at, heights = x([step for step, _ in points]), y([loss for _, loss in points])
            at = np.where((at >= 0) & (at <= 1), at, np.nan)
            drawn = (
                charts.draw_line(at, heights, css) if len(points) != 1 else charts.draw_dots(at, heights, "dot loss")
            )
            shapes.append((number, drawn))
    title = "training loss" + ("; dashed: on the probe's texts" if any(on_probe) else "")
    known = [(run.name, run.loss_points[0][1], run.loss_points[-1][1]) for run in runs if run.loss_points]
    ends = "; ".join(f"{name}: {format_value(first)} to {format_value(last)}" for name, first, last in known)
    return Panel(title, f"Training loss over the run. {ends}", shapes, (), y.ticks(4), x.ticks(7))


def _frame_layers(number: int, run: RunView, runs: Sequence[RunView]) -> Panel:
    """The panel of a heat map, which the script fills: with another quantity, or over another axis."""
    layers = max((len(record.per_layer or []) for record in run.measured), default=0)
    ticks = [((layer - 0.5) / layers, str(layer)) for layer in range(1, layers + 1, max(1, -(-layers // 6)))]
    says = f"distance of {layers} layers over {len(run.measured)} evaluations of {run.name}"
    title = "decoder layer" if len(runs) == 1 else f"decoder layer, {run.name}"
    return Panel(title, says, (), [(number, Markup('<canvas class="heat"></canvas>'))], ticks, [], "map", number)


def encode_layers(quantity: Quantity, runs: Sequence[RunView]) -> dict[str, Any]:
    """A quantity's values in all runs as codes on one scale, which the script draws and reads out."""
    tables = [views.stack_layers(quantity, run.measured) for run in runs]
    scale = fit_scale(np.concatenate([table.ravel() for table in tables]).tolist(), quantity.kind, padding=0.0)
    heights = [np.clip(scale(table), 0, 1) * (_MISSING - 1) for table in tables]
    codes = [np.where(np.isfinite(found), found.round(), _MISSING).astype("<u2") for found in heights]
    return {
        "label": quantity.label,
        "low": scale.low,
        "high": scale.high,
        "log": scale.kind == "log",
        "ticks": scale.ticks(4),
        "layers": [len(table) for table in codes],
        "codes": [base64.b64encode(table.tobytes()).decode() for table in codes],
    }


def draw_profiles(runs: Sequence[RunView]) -> Iterator[tuple[Quantity, Panel]]:
    """First, best and last evaluation over the layers: the distance, then each companion there is."""
    for quantity in views.list_quantities(runs):
        curves = [
            (number, moment, np.array(quantity.read(record)), BAND * np.array(record.per_layer_se or []))
            for number, run in enumerate(runs)
            for moment, record in run.moments.items()
            if quantity.read(record)
        ]
        if curves:
            layers = max(views.stack_layers(quantity, run.measured).shape[0] for run in runs)
            yield quantity, _draw_profile(quantity, runs, curves, layers)


def _draw_profile(
    quantity: Quantity, runs: Sequence[RunView], curves: Sequence[tuple[int, str, np.ndarray, np.ndarray]], layers: int
) -> Panel:
    x, shapes, says = Scale(0.5, layers + 0.5), [], []
    y = fit_scale((value for _, _, values, _ in curves for value in values.tolist()), quantity.kind)
    if quantity.name == "norm_ratio" and y.low < 1 < y.high:
        shapes.append((0, charts.draw_line([0, 1], [float(y([1.0])[0])] * 2, "level")))
    for number, moment, values, reach in curves:
        at, band = x(np.arange(1, len(values) + 1)), Markup("")
        if quantity is views.DISTANCE and len(reach) == len(values):
            least = y.low if y.kind == "log" else 0.0  # a logarithmic scale has no position for what lies below
            band = charts.draw_band(at, y(np.maximum(values - reach, least)), y(values + reach))
        curve = band + charts.draw_line(at, y(values)) + charts.draw_dots(at, y(values), "dot small")
        shapes.append((number, Markup('<g class="moment-{}">{}</g>').format(moment, curve)))
        ends = f"{format_value(values.min())} to {format_value(values.max())}"
        says.append(f"{runs[number].name}, {moment}: {ends}")
    ticks = [tick for tick in x.ticks(min(8, layers)) if "." not in tick[1]]
    return Panel(quantity.label, f"{quantity.label} over layers. {'; '.join(says)}", shapes, (), y.ticks(4), ticks)


def _steps(records: Sequence[EvalRecord]) -> list[int]:
    return [record.step for record in records]
