# SPDX-License-Identifier: Apache-2.0
"""Charts of what evaluations cost: the time of each, and their part of the time so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup

from mir_callback.analysis.page import charts
from mir_callback.analysis.page.facts import time_share
from mir_callback.analysis.page.scales import Scale, precise, scale_of
from mir_callback.analysis.page.views import RunView
from mir_callback.training.history import Record

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
