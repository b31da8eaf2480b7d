# SPDX-License-Identifier: Apache-2.0
"""Charts of what evaluations cost: the time of each, and their part of the time so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from mir_callback.analysis.page import charts
from mir_callback.analysis.page.charts import Scale, precise, scale_of
from mir_callback.analysis.page.facts import time_share
from mir_callback.analysis.page.timeline import BAND
from mir_callback.analysis.page.views import DISTANCE, Quantity, RunView, companions_of
from mir_callback.history import Record


@dataclass(frozen=True)
class Profile:
    """A picture over the layers, and what a pointer reads from it.

    Attributes:
        quantity: what is drawn upwards.
        picture: panel and axis.
        places: where the layers lie, 0 to 1.
        series: {"run", "moment", "values"} of each curve; values are texts.
    """

    quantity: Quantity
    picture: Markup
    places: list[float]
    series: list[dict[str, Any]]


@dataclass(frozen=True)
class _Curve:
    """One line of a picture: values of all layers, (layers,), at a moment of a run, and their standard errors."""

    run: int
    moment: str
    values: np.ndarray
    errors: np.ndarray | None

    @property
    def css(self) -> str:
        return f"run-{self.run} moment-{self.moment}"


def profiles(runs: Sequence[RunView]) -> list[Profile]:
    """The distance first, then each companion there is."""
    drawn = []
    for quantity in [DISTANCE, *companions_of(runs)]:
        curves = _curves(quantity, runs)
        if curves:
            drawn.append(_profile(quantity, runs, curves))
    return drawn


def _curves(quantity: Quantity, runs: Sequence[RunView]) -> list[_Curve]:
    curves = []
    for number, run in enumerate(runs):
        for moment, record in run.moments.items():
            values = quantity.of(record)
            errors = record.get("per_layer_se") if quantity is DISTANCE else None
            if values:
                known = errors is not None and len(errors) == len(values)
                curves.append(_Curve(number, moment, np.array(values), np.array(errors) if known else None))
    return curves


def _profile(quantity: Quantity, runs: Sequence[RunView], curves: Sequence[_Curve]) -> Profile:
    layers = max(len(curve.values) for curve in curves)
    x = Scale(0.5, layers + 0.5)
    y = scale_of((value for curve in curves for value in curve.values.tolist()), quantity.kind)
    shapes = (
        [charts.across(float(y([1.0])[0]), "level")] if quantity.name == "norm_ratio" and y.low < 1 < y.high else []
    )
    for curve in curves:
        shapes += _shapes(curve, x, y)
    ticks = [tick for tick in x.ticks(min(8, layers)) if "." not in tick[1]]
    told = [
        f"{runs[curve.run].name}, {curve.moment}: {precise(curve.values.min())} to {precise(curve.values.max())}"
        for curve in curves
    ]
    says = f"{quantity.label} over layers. {'; '.join(told)}"
    picture = charts.panel(y, shapes, title=quantity.label, says=says, x_ticks=ticks)
    series = [
        {"run": curve.run, "moment": curve.moment, "values": [precise(value) for value in curve.values.tolist()]}
        for curve in curves
    ]
    places = x(np.arange(1, layers + 1)).round(5).tolist()
    return Profile(quantity, picture + charts.foot(ticks, "decoder layer"), places, series)


def _shapes(curve: _Curve, x: Scale, y: Scale) -> list[Markup]:
    places = x(np.arange(1, len(curve.values) + 1))
    shapes = []
    if curve.errors is not None:
        reach = BAND * curve.errors
        least = y.low if y.kind == "log" else 0.0  # a logarithmic scale has no place for what lies below
        shapes.append(
            charts.band(places, y(np.maximum(curve.values - reach, least)), y(curve.values + reach), curve.css)
        )
    shapes.append(charts.line(places, y(curve.values), curve.css))
    shapes.append(charts.dots(places, y(curve.values), f"{curve.css} small"))
    return shapes


_CHARTS: tuple[tuple[str, float, Callable[[Record], float | None]], ...] = (
    ("seconds per evaluation", 1.0, lambda record: record.get("seconds")),
    ("evaluations' part of the time, %", 100.0, time_share),
    ("peak memory, besides training, GiB", 2.0**-30, lambda record: record.get("peak_memory_bytes")),
)


def cost_charts(runs: Sequence[RunView]) -> list[Markup]:
    """A chart over the steps for each cost that is known of more than one evaluation."""
    drawn = []
    for title, unit, value in _CHARTS:
        curves = [
            [(record["step"], unit * found) for record in run.measured if (found := value(record)) is not None]
            for run in runs
        ]
        if max(map(len, curves), default=0) > 1:
            drawn.append(_chart(runs, title, curves))
    return drawn


def _chart(runs: Sequence[RunView], title: str, curves: Sequence[Sequence[tuple[int, float]]]) -> Markup:
    x = scale_of([step for curve in curves for step, _ in curve], padding=0.02)
    highest = max(value for curve in curves for _, value in curve)
    y = Scale(0.0, 1.1 * highest or 1.0)
    shapes, told = [], []
    for number, curve in enumerate(curves):
        if curve:
            places, values = x([step for step, _ in curve]), [value for _, value in curve]
            shapes.append(charts.line(places, y(values), f"run-{number}"))
            shapes.append(charts.dots(places, y(np.array(values)), f"run-{number} small"))
            told.append(f"{runs[number].name}: {precise(min(values), 3)} to {precise(max(values), 3)}")
    ticks = x.ticks(5)
    panel = charts.panel(y, shapes, title=title, says=f"{title}. {'; '.join(told)}", x_ticks=ticks)
    return panel + charts.foot(ticks, "optimizer step")
