# SPDX-License-Identifier: Apache-2.0
"""Charts of values over the layers, and of what evaluations cost over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from mir_callback.analysis.page import charts
from mir_callback.analysis.page.charts import Scale, fit_scale, format_range, format_value
from mir_callback.analysis.page.facts import time_share
from mir_callback.analysis.page.timeline import BAND
from mir_callback.analysis.page.views import DISTANCE, Quantity, RunView, list_companions


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
    found = [(quantity, _read_curves(quantity, runs)) for quantity in [DISTANCE, *list_companions(runs)]]
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
        shapes.append(charts.draw_line(at, y(curve.values), css))
        shapes.append(charts.draw_dots(at, y(curve.values), f"{css} small"))
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
    ("evaluations' part of the time, %", 100.0, time_share),
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
            at, costs = x([step for step, _ in curve]), [cost for _, cost in curve]
            shapes.append(charts.draw_line(at, y(costs), f"run-{number}"))
            shapes.append(charts.draw_dots(at, y(costs), f"run-{number} small"))
            ranges.append(f"{run.name}: {format_range(np.array(costs), 3)}")
    ticks = x.ticks(5)
    panel = charts.make_panel(y, shapes, title=title, says=f"{title}. {'; '.join(ranges)}", x_ticks=ticks)
    return panel + charts.make_foot(ticks, "optimizer step")
