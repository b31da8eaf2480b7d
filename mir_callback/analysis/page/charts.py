# SPDX-License-Identifier: Apache-2.0
"""Scales and shapes of charts: SVG in coordinates of 0..1000, in HTML panels that the page stretches to its width."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import Locator, LogLocator, MaxNLocator

Kind = Literal["linear", "log"]
Ticks = list[tuple[float, str]]  # (position from 0 to 1, label)

_LEAST_POWER = -300.0  # of ten, on a logarithmic scale: floats end not far below


@dataclass(frozen=True)
class Scale:
    """Maps values from low..high to 0..1."""

    low: float
    high: float
    kind: Kind = "linear"

    def __call__(self, values: np.ndarray | Sequence[float]) -> np.ndarray:
        """Positions of values, (n,) float64; outside 0..1 if outside the scale, NaN if it cannot show them."""
        found, low, high = np.asarray(values, dtype=float), self.low, self.high
        if self.kind == "log":
            found = np.log10(np.where(found > 0, found, np.nan))
            low, high = math.log10(low), math.log10(high)
        return (found - low) / (high - low)

    def ticks(self, count: int) -> Ticks:
        """About ``count`` round values."""
        values = self._inside(MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10]))
        if self.kind == "log":  # 1, 2, 5 of each decade, or powers of ten where that is too many
            fine = self._inside(LogLocator(subs=(1.0, 2.0, 5.0), numticks=999))
            coarse = self._inside(LogLocator(numticks=count + 1))
            found = coarse if len(coarse) >= 3 and len(fine) > 1.5 * count else fine
            values = found if len(found) >= 3 else values
        return [(float(at), format_tick(value)) for at, value in zip(self(values), values, strict=True)]

    def _inside(self, locator: Locator) -> list[float]:
        slack = 1e-9 * (self.high - self.low) if self.kind == "linear" else 0.0
        values = locator.tick_values(self.low, self.high)
        return [float(value) for value in values if self.low - slack <= value <= self.high + slack]


def fit_scale(values: Iterable[float | None], kind: Kind = "linear", padding: float = 0.06) -> Scale:
    """A scale on which all values have a position, with ``padding``, a part of the whole, as room at both ends.

    What is None, NaN or infinite does not count, nor what is not positive on a logarithmic scale, which becomes a
    linear one where nothing is.
    """
    finite = [float(value) for value in values if value is not None and math.isfinite(value)]
    positive = [value for value in finite if value > 0]
    if kind == "log" and positive:
        low, high = math.log10(min(positive)), math.log10(max(positive))
        room = padding * (high - low) if low < high else 0.15
        return Scale(10 ** max(low - room, _LEAST_POWER), 10 ** (high + room), "log")
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    room = padding * (high - low) if low < high else max(0.05 * abs(low), 0.5 if padding == 0 else 0.05)
    return Scale(low - room, high + room)


def format_tick(value: float) -> str:
    """A round number as short as a tick label should be: 0.05, 1200, 25k, 3M."""
    units = ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
    found = (f"{value / unit:g}{letter}" for least, unit, letter in units if abs(value) >= least)
    return next(found, f"{value:.6g}").replace("-", "\N{MINUS SIGN}")


def format_value(value: float | None, digits: int = 4) -> str:
    """A measured number with its first digits; a dash where there is none."""
    if value is None:
        return "\N{EN DASH}"
    text = f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
    return text.replace("-", "\N{MINUS SIGN}")


# Shapes: x is 0 at the left border and 1 at the right one, y is 0 at the lower border and 1 at the upper one; arrays
# are (n,) and NaN where a point has no position; ``css`` are class names.


def draw_line(x: np.ndarray | Sequence[float], y: np.ndarray | Sequence[float], css: str = "line") -> Markup:
    """A line through points; it is interrupted where a point has no position."""
    known = np.isfinite(x) & np.isfinite(y)
    pens = np.where(np.r_[False, known][:-1], "L", "M")
    return _path(css, "".join(pen + _point(x[i], y[i]) for i, pen in enumerate(pens) if known[i]))


def draw_dots(x: np.ndarray, y: np.ndarray, css: str = "dot") -> Markup:
    """A dot at every point that has a position."""
    known = np.isfinite(x) & np.isfinite(y)
    return _path(css, "".join(f"M{_point(*point)}h.01" for point in zip(x[known], y[known], strict=True)))


def draw_band(x: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> Markup:
    """An area between two lines, in one piece for each row of points where both are known."""
    known = np.isfinite(x) & np.isfinite(lows) & np.isfinite(highs)
    drawn = []
    for piece in np.split(np.arange(len(x)), np.flatnonzero(np.diff(known)) + 1):
        if len(piece) > 1 and known[piece[0]]:
            around = [_point(x[i], highs[i]) for i in piece] + [_point(x[i], lows[i]) for i in reversed(piece)]
            drawn.append(f"M{'L'.join(around)}Z")
    return _path("band", "".join(drawn))


def draw_bar(left: float, right: float, css: str, title: str) -> Markup:
    """A bar over the whole height, with a text that shows where a pointer rests on it."""
    bar = Markup('<rect class="bar {}" x="{:.1f}" y="0" width="{:.1f}" height="1000"><title>{}</title></rect>')
    return bar.format(css, 1000 * left, 1000 * max(right - left, 0), title)


def draw_note(x: float, y: float, text: str, css: str) -> Markup:
    """Words beside a point, towards the middle of the chart."""
    note = '<span class="note {} {}" style="left:{:.2%};bottom:{:.2%}">{}</span>'
    return Markup(note).format("before" if x > 0.6 else "after", css, x, y, text)


def find_edges(x: Sequence[float] | np.ndarray, least: float = 0.0, most: float = 1.0) -> np.ndarray:
    """Borders half way between neighbours, the outer ones within bounds; (n,) increasing to (n + 1,) float64."""
    known = np.asarray(x, dtype=float)
    if len(known) == 1:
        return np.array([least, most])
    middle = (known[1:] + known[:-1]) / 2
    first, last = 2 * known[0] - middle[0], 2 * known[-1] - middle[-1]
    return np.concatenate([[max(first, least)], middle, [min(last, most)]])


def _point(x: float, y: float) -> str:
    return f"{1000 * x:.1f} {1000 * (1 - y):.1f}"


def _path(css: str, d: str) -> Markup:
    return Markup('<path class="{}" d="{}"/>').format(css, d) if d else Markup("")
