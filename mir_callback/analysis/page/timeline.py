# SPDX-License-Identifier: Apache-2.0
"""The page's charts: MIR, verdicts, loss and layers over the run; profiles over the layers; costs over the steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from markupsafe import Markup

from mir_callback.analysis.page import charts, views
from mir_callback.analysis.page.charts import Scale, Ticks, fit_scale, format_range, format_value
from mir_callback.analysis.page.views import DISTANCE, WOULD_STOP, Axis, Quantity, RunView, read_verdict
from mir_callback.analysis.statistics import BAND
from mir_callback.record import STOPPING, EvalRecord


@dataclass(frozen=True)
class Timeline:
    """The picture over one axis, the heat maps of all quantities in it, and x of each run's evaluations, 0 to 1."""

    axis: Axis
    picture: Markup
    x: list[list[float]]


@dataclass(frozen=True)
class _Horizontal:
    """The horizontal axis of a picture: maps steps of a run to 0..1, NaN where it has no position."""

    axis: Axis
    scale: Scale
    ticks: Ticks

    def __call__(self, run: RunView, steps: Sequence[int]) -> np.ndarray:
        return self.scale(self.axis.locate(run, steps))


def draw_timelines(runs: Sequence[RunView]) -> list[Timeline]:
    """The pictures of runs with values over each axis they share."""
    return [_draw_timeline(runs, axis) for axis in views.find_axes(runs)] if runs else []


def _draw_timeline(runs: Sequence[RunView], axis: Axis) -> Timeline:
    values = np.concatenate([axis.locate(run, _steps(run.records)) for run in runs])
    known = values[np.isfinite(values)]
    # The ends a little outside the outermost values, so that their dots and columns are whole.
    scale = fit_scale(known.tolist(), padding=0.02)
    if axis.logarithmic:
        scale = Scale(float(known.min()), float(known.max()) * 1.08 + 0.5, "log1p")
    x = _Horizontal(axis, scale, scale.ticks(7))
    panels = [_draw_mir(runs, x)]
    if any(record.verdict for run in runs for record in run.records):
        panels += [_draw_ribbon(number, run, x) for number, run in enumerate(runs)]
    if any(run.loss_points for run in runs) or any(record.probe_loss for run in runs for record in run.measured):
        panels.append(_draw_loss(runs, x))
    panels += _draw_layers(runs, x)
    positions = [[round(float(at), 5) for at in x(run, _steps(run.measured))] for run in runs]
    return Timeline(axis, Markup("").join(panels), positions)


def _draw_mir(runs: Sequence[RunView], x: _Horizontal) -> Markup:
    values = [_column(run, "mir") for run in runs]
    errors = [BAND * _column(run, "mir_se") for run in runs]
    reach = [mir + side * np.nan_to_num(error) for mir, error in zip(values, errors, strict=True) for side in (-1, 1)]
    y = fit_scale(np.concatenate(reach).tolist())
    y = Scale(y.low - 0.07 * (y.high - y.low), y.high)  # room for the words below the lowest value
    shapes: list[Markup] = []
    over: list[Markup] = []
    for number, (run, mir, error) in enumerate(zip(runs, values, errors, strict=True)):
        at, css = x(run, _steps(run.measured)), f"run-{number}"
        shapes.append(charts.draw_band(at, y(mir - error), y(mir + error), css))
        shapes.append(charts.draw_curve(at, y(mir), css, "small" if len(mir) > 100 else ""))
        marks, words = _draw_marks(run, number, x, y, alone=len(runs) == 1)
        shapes += marks
        over += words
    ends = [[f"{record.mir:.3f} at step {record.step}" for record in run.moments.values()] for run in runs]
    said = [f"{run.name}: {first}, lowest {best}, {last}" for run, (first, best, last) in zip(runs, ends, strict=True)]
    says, title = f"MIR over the run. {'; '.join(said)}", "MIR (lower is better aligned)"
    return charts.make_panel(y, shapes, title=title, says=says, size="tall", x_ticks=x.ticks, over=over)


def _draw_marks(run: RunView, number: int, x: _Horizontal, y: Scale, alone: bool) -> tuple[list[Markup], list[Markup]]:
    """What stands out: the best value, where the rule would stop, new stages, and evaluations that failed."""
    css, best = f"run-{number}", run.moments["best"]
    at, height = x(run, [best.step]), y(np.array([best.mir], dtype=float))
    shapes = [charts.draw_dots(at, height, f"best-{part} {css}") for part in ("outer", "inner")]
    words = [charts.draw_note(float(at[0]), float(height[0]), f"lowest {best.mir:.3f}", f"below {css}")]
    verdicts = [read_verdict(record) for record in run.measured]
    for record, verdict, before in zip(run.measured, verdicts, ["", *verdicts], strict=False):
        if verdict in (STOPPING, WOULD_STOP) and verdict != before:
            left = float(x(run, [record.step])[0])
            shapes.append(charts.draw_upright(left, f"stop {css}"))
            if len(words) == 1:  # of the first stop only
                words.append(charts.draw_note(left, 1.0, f"{verdict}, step {record.step}", "top"))
    for earlier, later in pairwise(record for record in run.measured if record.stage is not None):
        if later.stage != earlier.stage:
            left = float(x(run, [later.step])[0])
            shapes.append(charts.draw_upright(left, f"stage {css}"))
            words.append(charts.draw_note(left, 0.93, f"other parameters train, step {later.step}", "top faint"))
    crosses = [
        Markup('<span class="cross-mark {}" style="left:{}" title="step {}: {}">\N{MULTIPLICATION SIGN}</span>').format(
            css, charts.percent(left), record.step, record.error or "failed"
        )
        for left, record in zip(x(run, _steps(run.failed)), run.failed, strict=True)
        if np.isfinite(left)
    ]
    return shapes, [*(words if alone else []), *crosses]


def _draw_ribbon(number: int, run: RunView, x: _Horizontal) -> Markup:
    """A ribbon of the rule's verdicts."""
    at = x(run, _steps(run.records))
    records = [record for record, left in zip(run.records, at, strict=True) if np.isfinite(left)]
    edges = charts.find_edges(at[np.isfinite(at)])
    bars, left = [], 0
    for verdict, group in groupby(records, read_verdict):
        span = list(group)
        right = left + len(span)
        if verdict:
            title = f"{verdict}, steps {span[0].step} to {span[-1].step}: {span[-1].reason or ''}"
            css = f"verdict {views.VERDICTS.get(verdict, 'other')}"
            bars.append(charts.draw_bar(edges[left], edges[right], css, title))
        left = right
    says = f"Verdicts of the stop rule on {run.name}; the last one: {read_verdict(run.records[-1]) or 'none'}"
    return charts.make_panel(None, bars, title="", says=says, size=f"ribbon run-{number}")


def _draw_loss(runs: Sequence[RunView], x: _Horizontal) -> Markup:
    on_probe = [[(r.step, r.probe_loss) for r in run.measured if r.probe_loss is not None] for run in runs]
    y = fit_scale((loss for points in [*(run.loss_points for run in runs), *on_probe] for _, loss in points), "log")
    shapes = []
    for number, (run, probed) in enumerate(zip(runs, on_probe, strict=True)):
        at, heights = x(run, [step for step, _ in run.loss_points]), y([loss for _, loss in run.loss_points])
        at = np.where((at >= 0) & (at <= 1), at, np.nan)
        shapes.append(charts.draw_line(at, heights, f"loss run-{number}"))
        if probed:
            steps, losses = zip(*probed, strict=True)
            shapes.append(charts.draw_line(x(run, steps), y(losses), f"loss on-probe run-{number}"))
        if len(at) == 1:
            shapes.append(charts.draw_dots(at, heights, f"loss run-{number}"))
    title = "training loss" + ("; dashed: on the probe's texts" if any(on_probe) else "")
    known = [(run.name, run.loss_points[0][1], run.loss_points[-1][1]) for run in runs if run.loss_points]
    ends = "; ".join(f"{name}: {format_value(first)} to {format_value(last)}" for name, first, last in known)
    return charts.make_panel(y, shapes, title=title, says=f"Training loss over the run. {ends}", x_ticks=x.ticks)


def _draw_layers(runs: Sequence[RunView], x: _Horizontal) -> Iterator[Markup]:
    """For each quantity the heat maps of all runs, in one scale of colours."""
    foot = charts.make_foot(x.ticks, x.axis.label)
    for quantity in [DISTANCE, *views.list_companions(runs)]:
        tables = [views.stack_layers(quantity, run.measured) for run in runs]
        visible = np.concatenate([table.ravel() for table in tables])
        scale = fit_scale(visible.tolist(), quantity.kind, padding=0.0)
        shown = [
            _draw_heat(runs, number, quantity, x, scale, table)
            for number, table in enumerate(tables)
            if np.isfinite(table).any()
        ]
        hidden = Markup("") if quantity is DISTANCE else Markup(" hidden")
        yield Markup('<div class="layers" data-quantity="{}"{}>{}{}{}</div>').format(
            quantity.name, hidden, Markup("").join(shown), foot, charts.make_colour_bar(scale, quantity.label)
        )


def _draw_heat(
    runs: Sequence[RunView], number: int, quantity: Quantity, x: _Horizontal, scale: Scale, table: np.ndarray
) -> Markup:
    run = runs[number]
    layers, count = table.shape
    says = f"{quantity.label} of {layers} layers over {count} evaluations of {run.name}, from {format_range(table)}"
    ticks = [((layer - 0.5) / layers, str(layer)) for layer in range(1, layers + 1, max(1, -(-layers // 6)))]
    picture = charts.draw_heat_map(charts.find_edges(x(run, _steps(run.measured))), table, scale, says)
    title = "decoder layer" if len(runs) == 1 else f"decoder layer, {run.name}"
    return charts.make_panel(None, [], title=title, says=says, size=f"map run-{number}", over=[picture], y_ticks=ticks)


def _steps(records: Sequence[EvalRecord]) -> list[int]:
    return [record.step for record in records]


def _column(run: RunView, field: str) -> np.ndarray:
    """A field of each evaluation, NaN where it is not known."""
    return np.array([record[field] for record in run.measured], dtype=float)


@dataclass(frozen=True)
class Profile:
    """A picture over the layers, and what a pointer reads from it."""

    quantity: Quantity
    picture: Markup
    x: list[float]  # of the layers, 0 to 1
    series: list[dict[str, Any]]  # run, moment and values, as texts, of each curve


@dataclass(frozen=True)
class _Curve:
    """One line of a picture."""

    run: int
    moment: str
    values: np.ndarray  # (layers,)
    errors: np.ndarray | None  # their standard errors


def draw_profiles(runs: Sequence[RunView]) -> list[Profile]:
    """The distance first, then each companion there is."""
    found = [(quantity, _read_curves(quantity, runs)) for quantity in [DISTANCE, *views.list_companions(runs)]]
    return [_draw_profile(quantity, runs, curves) for quantity, curves in found if curves]


def _read_curves(quantity: Quantity, runs: Sequence[RunView]) -> list[_Curve]:
    curves = []
    for number, run in enumerate(runs):
        for moment, record in run.moments.items():
            values, errors = quantity.read(record), record.per_layer_se or []
            known = quantity is DISTANCE and len(errors) == len(values)
            if values:
                curves.append(_Curve(number, moment, np.array(values), np.array(errors) if known else None))
    return curves


def _draw_profile(quantity: Quantity, runs: Sequence[RunView], curves: Sequence[_Curve]) -> Profile:
    layers = max(len(curve.values) for curve in curves)
    x = Scale(0.5, layers + 0.5)
    y = fit_scale((value for curve in curves for value in curve.values.tolist()), quantity.kind)
    marked = quantity.name == "norm_ratio" and y.low < 1 < y.high
    shapes = [charts.draw_across(float(y([1.0])[0]), "level")] if marked else []
    for curve in curves:
        at, css = x(np.arange(1, len(curve.values) + 1)), f"run-{curve.run} moment-{curve.moment}"
        if curve.errors is not None:
            reach = BAND * curve.errors
            least = y.low if y.kind == "log" else 0.0  # a logarithmic scale has no position for what lies below
            lows, highs = y(np.maximum(curve.values - reach, least)), y(curve.values + reach)
            shapes.append(charts.draw_band(at, lows, highs, css))
        shapes.append(charts.draw_curve(at, y(curve.values), css, "small"))
    ticks = [tick for tick in x.ticks(min(8, layers)) if "." not in tick[1]]
    ranges = [f"{runs[curve.run].name}, {curve.moment}: {format_range(curve.values)}" for curve in curves]
    says = f"{quantity.label} over layers. {'; '.join(ranges)}"
    picture = charts.make_panel(y, shapes, title=quantity.label, says=says, x_ticks=ticks)
    series = [
        {"run": curve.run, "moment": curve.moment, "values": [format_value(value) for value in curve.values.tolist()]}
        for curve in curves
    ]
    layers_at = x(np.arange(1, layers + 1)).round(5).tolist()
    return Profile(quantity, picture + charts.make_foot(ticks, "decoder layer"), layers_at, series)


_COSTS = (
    ("seconds per evaluation", 1.0, lambda record: record.seconds),
    ("evaluations' part of the time, %", 100.0, views.time_share),
    ("peak memory, besides training, GiB", 2.0**-30, lambda record: record.peak_memory_bytes),
)


def draw_costs(runs: Sequence[RunView]) -> list[Markup]:
    """A chart over the steps for each cost that is known of more than one evaluation."""
    drawn = []
    for title, unit, read in _COSTS:
        curves = [
            [(record.step, unit * cost) for record in run.measured if (cost := read(record)) is not None]
            for run in runs
        ]
        if max(map(len, curves), default=0) > 1:
            drawn.append(_draw_cost(runs, title, curves))
    return drawn


def _draw_cost(runs: Sequence[RunView], title: str, curves: Sequence[Sequence[tuple[int, float]]]) -> Markup:
    x = fit_scale([step for curve in curves for step, _ in curve], padding=0.02)
    y = Scale(0.0, 1.1 * max(cost for curve in curves for _, cost in curve) or 1.0)
    shapes, ranges = [], []
    for number, (run, curve) in enumerate(zip(runs, curves, strict=True)):
        if curve:
            steps, costs = zip(*curve, strict=True)
            shapes.append(charts.draw_curve(x(steps), y(costs), f"run-{number}", "small"))
            ranges.append(f"{run.name}: {format_range(np.array(costs), 3)}")
    ticks = x.ticks(5)
    panel = charts.make_panel(y, shapes, title=title, says=f"{title}. {'; '.join(ranges)}", x_ticks=ticks)
    return panel + charts.make_foot(ticks, "optimizer step")
