# SPDX-License-Identifier: Apache-2.0
"""MIR, verdicts, loss and layers over the same horizontal axis, one picture for each axis there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from markupsafe import Markup

from mir_callback.analysis.page import charts
from mir_callback.analysis.page import charts as heat
from mir_callback.analysis.page.charts import Scale, precise, scale_of
from mir_callback.analysis.page.views import DISTANCE, Axis, Quantity, RunView, axes_of, companions_of, over_layers
from mir_callback.history import STOPPING, Record

_OBSERVED = "would stop"  # of a rule that only observes, where it has found the plateau
VERDICTS = {
    "going on": "going-on",
    STOPPING: "plateau",
    _OBSERVED: "plateau",
    "rising": "rising",
    "too noisy": "too-noisy",
    "no data": "no-data",
    "failed": "failed",
}


def verdict_of(record: Record) -> str:
    """What the stop rule said; "failed" where the evaluation did; "" without a rule."""
    if record.get("mir") is None:
        return "failed"
    verdict = str(record.get("verdict") or "")
    return _OBSERVED if record.get("would_stop") and verdict != STOPPING else verdict


def marks(run: RunView, number: int, axis: Axis, x: Scale, y: Scale, alone: bool) -> tuple[list[Markup], list[Markup]]:
    """What stands out: the best value, where the rule would stop, and evaluations that failed."""
    css = f"run-{number}"
    best = run.moments["best"]
    place, height = float(x(axis.places(run, [best["step"]]))[0]), float(y([best["mir"]])[0])
    shapes = [charts.dots(np.array([place]), np.array([height]), f"best-outer {css}")]
    shapes.append(charts.dots(np.array([place]), np.array([height]), f"best-inner {css}"))
    words = [charts.note(place, height, f"lowest {best['mir']:.3f}", f"below {css}")] if alone else []
    for number_of_stop, (step, verdict) in enumerate(_plateaus(run)):
        place = float(x(axis.places(run, [step]))[0])
        shapes.append(charts.upright(place, f"stop {css}"))
        if alone and number_of_stop == 0:
            words.append(charts.note(place, 1.0, f"{verdict}, step {step}", "top"))
    for step in _stages(run):
        place = float(x(axis.places(run, [step]))[0])
        shapes.append(charts.upright(place, f"stage {css}"))
        if alone:
            words.append(charts.note(place, 0.93, f"other parameters train, step {step}", "top faint"))
    failed = x(axis.places(run, [record["step"] for record in run.failed]))
    words += [
        Markup(
            '<span class="cross-mark {}" style="left:{}%" title="step {}: {}">\N{MULTIPLICATION SIGN}</span>'
        ).format(css, f"{100 * place:.2f}", record["step"], record.get("error") or "failed")
        for place, record in zip(failed, run.failed, strict=True)
        if np.isfinite(place)
    ]
    return shapes, words


def ribbon(number: int, run: RunView, axis: Axis, x: Scale) -> Markup:
    """A ribbon of the rule's verdicts."""
    places = x(axis.places(run, [record["step"] for record in run.records]))
    records = [record for record, place in zip(run.records, places, strict=True) if np.isfinite(place)]
    edges = heat.edges_between(places[np.isfinite(places)])
    bars = []
    for verdict, group in groupby(range(len(records)), lambda index: verdict_of(records[index])):
        if verdict:
            span = list(group)
            first, last = records[span[0]], records[span[-1]]
            title = f"{verdict}, steps {first['step']} to {last['step']}: {last.get('reason') or ''}"
            bars.append(
                charts.bar(edges[span[0]], edges[span[-1] + 1], f"verdict {VERDICTS.get(verdict, 'other')}", title)
            )
    says = f"Verdicts of the stop rule on {run.name}; the last one: {verdict_of(run.records[-1]) or 'none'}"
    return charts.panel(None, bars, title="", says=says, size=f"ribbon run-{number}")


def _plateaus(run: RunView) -> list[tuple[int, str]]:
    """Where a plateau was found, the first of each row of such verdicts: its step, and what the rule said."""
    found = [(record["step"], verdict_of(record)) for record in run.measured]
    said = [verdict for _, verdict in found]
    return [
        (step, verdict)
        for (step, verdict), before in zip(found, ["", *said], strict=False)
        if verdict in (STOPPING, _OBSERVED) and verdict != before
    ]


def _stages(run: RunView) -> list[int]:
    """The steps at which other parameters were trained than at the evaluation before."""
    known = [record for record in run.measured if record.get("stage") is not None]
    return [
        record["step"] for record, before in zip(known[1:], known, strict=False) if record["stage"] != before["stage"]
    ]


# 95 % of a normal distribution.
BAND = 1.96


@dataclass(frozen=True)
class Timeline:
    """The picture over one axis.

    Attributes:
        axis: what runs to the right.
        picture: panels and axis; the heat maps of each quantity are in it, one of them shown.
        places: for each run where its evaluations lie, 0 to 1.
    """

    axis: Axis
    picture: Markup
    places: list[list[float]]


def timelines(runs: Sequence[RunView]) -> list[Timeline]:
    """The pictures of runs with values over each axis they share."""
    return [_timeline(runs, axis) for axis in axes_of(runs)]


def _timeline(runs: Sequence[RunView], axis: Axis) -> Timeline:
    values = [axis.places(run, [record["step"] for record in run.records]) for run in runs]
    x = _horizontal(axis, np.concatenate(values))
    ticks = x.ticks(7)
    panels = [_mir_panel(runs, axis, x, ticks)]
    if any(record.get("verdict") for run in runs for record in run.records):
        panels += [ribbon(number, run, axis, x) for number, run in enumerate(runs)]
    if any(run.loss_points for run in runs) or any(record.get("probe_loss") for run in runs for record in run.measured):
        panels.append(_loss_panel(runs, axis, x, ticks))
    panels += _heat_panels(runs, axis, x, charts.foot(ticks, axis.label))
    picture = Markup("").join(panels)
    measured = [axis.places(run, [record["step"] for record in run.measured]) for run in runs]
    return Timeline(axis, picture, [[round(float(place), 5) for place in x(places)] for places in measured])


def _horizontal(axis: Axis, values: np.ndarray) -> Scale:
    """The ends a little outside the outermost values, so that their dots and columns are whole."""
    known = values[np.isfinite(values)]
    if axis.logarithmic:
        return Scale(float(known.min()), float(known.max()) * 1.08 + 0.5, "log1p")
    return scale_of(known.tolist(), padding=0.02)


def _mir_panel(runs: Sequence[RunView], axis: Axis, x: Scale, ticks: Any) -> Markup:
    reach = [
        record["mir"] + side * BAND * (record.get("mir_se") or 0)
        for run in runs
        for record in run.measured
        for side in (-1, 1)
    ]
    y = scale_of(reach)
    y = Scale(y.low - 0.07 * (y.high - y.low), y.high)  # room for the words below the lowest value
    shapes: list[Markup] = []
    over: list[Markup] = []
    for number, run in enumerate(runs):
        places = x(axis.places(run, [record["step"] for record in run.measured]))
        values = np.array([record["mir"] for record in run.measured])
        errors = BAND * np.array([_number(record.get("mir_se")) for record in run.measured])
        css = f"run-{number}"
        shapes += [
            charts.band(places, y(values - errors), y(values + errors), css),
            charts.line(places, y(values), css),
            charts.dots(places, y(values), f"{css} {'small' if len(values) > 100 else ''}"),
        ]
        shown, words = marks(run, number, axis, x, y, alone=len(runs) == 1)
        shapes += shown
        over += words
    says = "; ".join(f"{run.name}: {_in_words(run)}" for run in runs)
    return charts.panel(
        y,
        shapes,
        title="MIR (lower is better aligned)",
        says=f"MIR over the run. {says}",
        size="tall",
        x_ticks=ticks,
        over=over,
    )


def _loss_panel(runs: Sequence[RunView], axis: Axis, x: Scale, ticks: Any) -> Markup:
    on_probe = [[(r["step"], r["probe_loss"]) for r in run.measured if r.get("probe_loss") is not None] for run in runs]
    y = scale_of((loss for points in [run.loss_points for run in runs] + on_probe for _, loss in points), "log")
    shapes = []
    for number, run in enumerate(runs):
        points = run.loss_points
        places = x(axis.places(run, [step for step, _ in points]))
        places = np.where((places >= 0) & (places <= 1), places, np.nan)
        heights = y([loss for _, loss in points])
        shapes.append(charts.line(places, heights, f"loss run-{number}"))
        if on_probe[number]:
            texts = x(axis.places(run, [step for step, _ in on_probe[number]]))
            shapes.append(charts.line(texts, y([loss for _, loss in on_probe[number]]), f"loss on-probe run-{number}"))
        if len(points) == 1:
            shapes.append(charts.dots(places, heights, f"loss run-{number}"))
    title = "training loss" + ("; dashed: on the probe's texts" if any(on_probe) else "")
    ends = "; ".join(
        f"{run.name}: {precise(run.loss_points[0][1])} to {precise(run.loss_points[-1][1])}"
        for run in runs
        if run.loss_points
    )
    return charts.panel(y, shapes, title=title, says=f"Training loss over the run. {ends}", x_ticks=ticks)


def _heat_panels(runs: Sequence[RunView], axis: Axis, x: Scale, foot: Markup) -> Iterator[Markup]:
    for quantity in [DISTANCE, *companions_of(runs)]:
        tables = [over_layers(quantity, run.measured) for run in runs]
        visible = np.concatenate([table.ravel() for table in tables])
        scale = scale_of(visible.tolist(), quantity.kind, padding=0.0)
        shown = []
        for number, (run, table) in enumerate(zip(runs, tables, strict=True)):
            if table.size and np.isfinite(table).any():
                shown.append(_heat_panel(number, run, quantity, axis, x, scale, table, alone=len(runs) == 1))
        hidden = Markup("") if quantity is DISTANCE else Markup(" hidden")
        yield Markup('<div class="layers" data-quantity="{}"{}>{}{}{}</div>').format(
            quantity.name, hidden, Markup("").join(shown), foot, heat.colour_bar(scale, quantity.label)
        )


def _heat_panel(
    number: int, run: RunView, quantity: Quantity, axis: Axis, x: Scale, scale: Scale, table: np.ndarray, *, alone: bool
) -> Markup:
    edges = heat.edges_between(x(axis.places(run, [record["step"] for record in run.measured])))
    layers = table.shape[0]
    says = (
        f"{quantity.label} of {layers} layers over {table.shape[1]} evaluations of {run.name}, "
        f"from {precise(float(np.nanmin(table)))} to {precise(float(np.nanmax(table)))}"
    )
    every = max(1, -(-layers // 6))
    ticks = [((layer - 0.5) / layers, str(layer)) for layer in range(1, layers + 1, every)]
    picture = heat.heat_map(edges, table, scale, says)
    title = "decoder layer" if alone else f"decoder layer, {run.name}"
    return charts.panel(None, [], title=title, says=says, size=f"map run-{number}", over=[picture], y_ticks=ticks)


def _in_words(run: RunView) -> str:
    first, best, last = (run.moments[name] for name in ("first", "best", "last"))
    return (
        f"{first['mir']:.3f} at step {first['step']}, lowest {best['mir']:.3f} at step {best['step']}, "
        f"{last['mir']:.3f} at step {last['step']}"
    )


def _number(value: float | None) -> float:
    return np.nan if value is None else value
