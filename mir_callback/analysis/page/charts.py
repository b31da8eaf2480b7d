# SPDX-License-Identifier: Apache-2.0
"""Scales, panels and shapes of charts as SVG, and heat maps as small pictures that the page stretches."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.ticker import LogLocator, MaxNLocator
from PIL import Image

Kind = Literal["linear", "log", "log1p"]
Ticks = Sequence[tuple[float, str]]  # (position from 0 to 1, label)

_FEWEST_TICKS = 3
_LEAST_POWER = -300.0  # of ten, on a logarithmic scale: floats end not far below
_SIDE = 1000  # of the coordinates in a panel
_COLOURS = 255  # the palette's last entry is for cells without a value
_MAP = "viridis"
_PIXELS = 1200  # across a heat map: cells are as wide as their evaluations lie apart


@dataclass(frozen=True)
class Scale:
    """Maps values from low..high to 0..1; "log1p" is a logarithmic kind that shows zero too."""

    low: float
    high: float
    kind: Kind = "linear"

    def __call__(self, values: np.ndarray | Sequence[float]) -> np.ndarray:
        """Positions of values, (n,) float64; outside 0..1 if outside the scale, NaN if it cannot show them."""
        low, high = self._transform(np.array([self.low, self.high]))
        found: np.ndarray = (self._transform(np.asarray(values, dtype=float)) - low) / (high - low)
        return found

    def ticks(self, count: int) -> Ticks:
        """About ``count`` round values."""
        values = self._round_values(count)
        return [(float(at), format_tick(value)) for at, value in zip(self(values), values, strict=True)]

    def _transform(self, values: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.kind == "log":
                return np.where(values > 0, np.log10(np.where(values > 0, values, 1.0)), np.nan)
            return np.log1p(values) if self.kind == "log1p" else values

    def _round_values(self, count: int) -> list[float]:
        if self.kind != "linear":
            # 1, 2, 5 of each decade where that is not too many, or else the powers of ten, if need be not all of them.
            fine, coarse = self._of_decades((1.0, 2.0, 5.0)), self._of_decades((1.0,))
            if len(coarse) >= _FEWEST_TICKS and len(fine) > 1.5 * count:
                return coarse[:: math.ceil(len(coarse) / (1.5 * count))]
            if len(fine) >= _FEWEST_TICKS:
                return fine
        return self._inside(MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high))

    def _of_decades(self, digits: tuple[float, ...]) -> list[float]:
        from_zero = self.kind == "log1p"
        low = max(self.low, 1.0) if from_zero else self.low
        values = LogLocator(subs=digits, numticks=99).tick_values(low, self.high)
        found = self._inside(value for value in values if value >= low)
        return [0.0, *found] if from_zero and self.low <= 0 else found

    def _inside(self, values: Iterable[float]) -> list[float]:
        slack = 1e-9 * (self.high - self.low) if self.kind == "linear" else 0.0
        return [float(value) for value in values if self.low - slack <= value <= self.high + slack]


def fit_scale(values: Iterable[float | None], kind: Kind = "linear", padding: float = 0.06) -> Scale:
    """A scale on which all values have a position, with room at both ends.

    What is None, NaN or infinite does not count, nor what is not positive on a logarithmic scale, which becomes a
    linear one where nothing is. ``padding`` is the room at either end, as a part of the whole.
    """
    finite = [float(value) for value in values if value is not None and math.isfinite(value)]
    if kind == "log":
        positive = [value for value in finite if value > 0]
        if not positive:
            return fit_scale(finite, "linear", padding)
        low, high = math.log10(min(positive)), math.log10(max(positive))
        room = padding * (high - low) if low < high else 0.15
        return Scale(10 ** max(low - room, _LEAST_POWER), 10 ** (high + room), "log")
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    room = padding * (high - low)
    if low == high:
        room = max(0.05 * abs(low), 0.5 if padding == 0 else 0.05)
    return Scale(low - room if kind == "linear" else low, high + room, kind)


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


def format_range(values: np.ndarray, digits: int = 4) -> str:
    """The least and the largest of measured numbers, NaN left out."""
    return f"{format_value(float(np.nanmin(values)), digits)} to {format_value(float(np.nanmax(values)), digits)}"


# Shapes: x is 0 at the left border and 1 at the right one, y is 0 at the lower border and 1 at the upper one; arrays
# are (n,) and NaN where a point has no position; ``css`` are class names.


def draw_line(x: np.ndarray, y: np.ndarray, css: str) -> Markup:
    """A line through points; it is interrupted where a point has no position."""
    drawn, pen = [], "M"
    for known, left, height in zip(np.isfinite(x) & np.isfinite(y), x, y, strict=True):
        if known:
            drawn.append(f"{pen}{_x(left)} {_y(height)}")
        pen = "L" if known else "M"
    return _path(f"line {css}", "".join(drawn))


def draw_dots(x: np.ndarray, y: np.ndarray, css: str) -> Markup:
    """A dot at every point that has a position."""
    known = np.isfinite(x) & np.isfinite(y)
    points = zip(x[known], y[known], strict=True)
    return _path(f"dot {css}", "".join(f"M{_x(left)} {_y(height)}h.01" for left, height in points))


def draw_curve(x: np.ndarray, y: np.ndarray, css: str, dots: str) -> Markup:
    """A line through points with a dot at each; ``dots`` are further class names of these."""
    return draw_line(x, y, css) + draw_dots(x, y, f"{css} {dots}")


def draw_band(x: np.ndarray, lows: np.ndarray, highs: np.ndarray, css: str) -> Markup:
    """An area between two lines, in one piece for each row of points where both are known."""
    known = np.isfinite(x) & np.isfinite(lows) & np.isfinite(highs)
    drawn = []
    for piece in np.split(np.arange(len(x)), np.flatnonzero(np.diff(known)) + 1):
        if len(piece) > 1 and known[piece[0]]:
            forth = [f"{_x(x[i])} {_y(highs[i])}" for i in piece]
            back = [f"{_x(x[i])} {_y(lows[i])}" for i in reversed(piece)]
            drawn.append(f"M{'L'.join(forth + back)}Z")
    return _path(f"band {css}", "".join(drawn))


def draw_bar(left: float, right: float, css: str, title: str) -> Markup:
    """A bar over the whole height, with a text that shows where a pointer rests on it."""
    bar = Markup('<rect class="bar {}" x="{}" y="0" width="{}" height="1000"><title>{}</title></rect>')
    return bar.format(css, _x(left), _x(max(right - left, 0)), title)


def draw_upright(x: float, css: str) -> Markup:
    """A line from the lower to the upper border."""
    return _path(f"upright {css}", f"M{_x(x)} 0V1000")


def draw_across(y: float, css: str) -> Markup:
    """A line from the left to the right border."""
    return _path(f"across {css}", f"M0 {_y(y)}H1000")


def draw_note(x: float, y: float, text: str, css: str) -> Markup:
    """Words beside a point, towards the middle of the chart."""
    side = "before" if x > 0.6 else "after"
    words = Markup('<span class="note {} {}" style="left:{};bottom:{}">{}</span>')
    return words.format(side, css, percent(x), percent(y), text)


def make_panel(
    y: Scale | None,
    shapes: Iterable[Markup],
    *,
    title: str,
    says: str,
    size: str = "medium",
    x_ticks: Ticks = (),
    over: Iterable[Markup] = (),
    y_ticks: Ticks | None = None,
) -> Markup:
    """One coordinate system: SVG ``shapes``, the lowest first, and HTML ``over`` them.

    ``title`` stands above, ``says`` is the picture in words for those who do not see it, ``size`` the class name that
    sets the height; ``y_ticks`` stand instead of round values of ``y``.
    """
    ticks = y_ticks if y_ticks is not None else y.ticks(4 if size != "tall" else 6) if y else []
    grid = [*(draw_across(at, "grid") for at, _ in ticks), *(draw_upright(at, "grid") for at, _ in x_ticks)]
    return Markup(
        '<div class="panel {}"><div class="ytitle">{}</div><div class="yticks" aria-hidden="true">{}</div>'
        '<div class="area"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{}">'
        '{}{}</svg>{}<div class="cross"></div></div></div>'
    ).format(size, title, _labels("bottom", ticks), says, _all(grid), _all(shapes), _all(over))


def make_foot(ticks: Ticks, label: str) -> Markup:
    """Numbers and name of the horizontal axis, below the lowest panel."""
    return Markup(
        '<div class="foot"><div class="xticks" aria-hidden="true">{}</div><div class="xlabel">{}</div></div>'
    ).format(_labels("left", ticks), label)


def draw_heat_map(edges: np.ndarray, values: np.ndarray, scale: Scale, says: str) -> Markup:
    """A picture of values, (layers, evaluations), with layers upwards; NaN stays empty, ``scale`` is of the colours.

    ``edges`` are the borders of the columns, (evaluations + 1,), increasing, from 0 to 1.
    """
    column = np.searchsorted(edges, (np.arange(_PIXELS) + 0.5) / _PIXELS, side="right") - 1
    inside = (column >= 0) & (column < values.shape[1])
    heights = scale(values)
    if scale.kind == "log":
        heights = np.where(values <= 0, 0.0, heights)  # below every positive value
    codes = np.full(values.shape, _COLOURS, dtype=np.uint8)
    known = np.isfinite(heights)
    codes[known] = (np.clip(heights[known], 0, 1) * (_COLOURS - 1)).round()
    pixels = np.full((values.shape[0], _PIXELS), _COLOURS, dtype=np.uint8)
    pixels[:, inside] = codes[::-1, column[inside]]  # layer 1 lies lowest
    picture = Image.fromarray(pixels, mode="P")
    palette = (colormaps[_MAP](np.linspace(0, 1, _COLOURS))[:, :3] * 255).round().astype(np.uint8)
    picture.putpalette([*palette.ravel().tolist(), 0, 0, 0])
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True, transparency=_COLOURS)
    code = base64.b64encode(file.getvalue()).decode()
    return Markup('<img class="heat" alt="{}" src="data:image/png;base64,{}">').format(says, code)


def make_colour_bar(scale: Scale, label: str) -> Markup:
    """The colours of a scale, with numbers."""
    stops = ", ".join(f"rgb({r:.0f} {g:.0f} {b:.0f})" for r, g, b, _ in 255 * colormaps[_MAP](np.linspace(0, 1, 17)))
    return Markup(
        '<div class="colours"><span class="what">{}</span><div class="scale">'
        '<div class="ramp" style="background:linear-gradient(90deg, {})"></div><div class="xticks">{}</div></div></div>'
    ).format(label, stops, _labels("left", scale.ticks(4)))


def find_edges(x: Sequence[float] | np.ndarray, least: float = 0.0, most: float = 1.0) -> np.ndarray:
    """Borders half way between neighbours, the outer ones within bounds; (n,) increasing to (n + 1,) float64."""
    known = np.asarray(x, dtype=float)
    middle = (known[1:] + known[:-1]) / 2
    if len(known) == 1:
        return np.array([least, most])
    first, last = 2 * known[0] - middle[0], 2 * known[-1] - middle[-1]
    return np.concatenate([[max(first, least)], middle, [min(last, most)]])


def percent(share: float) -> str:
    """A length in a style, of the whole."""
    return f"{100 * share:.2f}%"


def _labels(side: str, ticks: Ticks) -> Markup:
    return _all(Markup('<span style="{}:{}">{}</span>').format(side, percent(at), label) for at, label in ticks)


def _all(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


def _path(css: str, d: str) -> Markup:
    return Markup('<path class="{}" d="{}"/>').format(css, d) if d else Markup("")


def _x(x: float) -> str:
    return f"{x * _SIDE:.1f}"


def _y(y: float) -> str:
    return f"{(1 - y) * _SIDE:.1f}"
