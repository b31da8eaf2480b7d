# SPDX-License-Identifier: Apache-2.0
"""Heat maps: layers upwards, evaluations to the right, as a small picture that the page stretches."""

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
_FEWEST_TICKS = 3
_LEAST_POWER = -300.0  # of ten, on a logarithmic scale: floats end not far below


@dataclass(frozen=True)
class Scale:
    """Maps values from low..high to 0..1.

    Attributes:
        low: value at 0.
        high: value at 1; above ``low``.
        kind: "linear", "log", or "log1p", which has a place for zero.
    """

    low: float
    high: float
    kind: Kind = "linear"

    def __call__(self, values: np.ndarray | list[float]) -> np.ndarray:
        """Places of values, (n,) float64; those outside the scale lie outside 0..1, those it cannot show are NaN."""
        low, high = self._inner(np.array([self.low, self.high]))
        places: np.ndarray = (self._inner(np.asarray(values, dtype=float)) - low) / (high - low)
        return places

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """About ``count`` round values as (place, label)."""
        values = self._round_values(count)
        return [(float(place), short(value)) for place, value in zip(self(list(values)), values, strict=True)]

    def _inner(self, values: np.ndarray) -> np.ndarray:
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
        values = [float(value) for value in LogLocator(subs=digits, numticks=99).tick_values(low, self.high)]
        found = self._inside(value for value in values if value >= low)
        return [0.0, *found] if from_zero and self.low <= 0 else found

    def _inside(self, values: Iterable[float]) -> list[float]:
        slack = 1e-9 * (self.high - self.low) if self.kind == "linear" else 0.0
        return [float(value) for value in values if self.low - slack <= value <= self.high + slack]


def scale_of(values: Iterable[float | None], kind: Kind = "linear", padding: float = 0.06) -> Scale:
    """A scale on which all values have a place, with room at both ends.

    Args:
        values: None, NaN and infinite ones do not count; nor do those up to zero on a logarithmic scale.
        kind: see :class:`Scale`; "log" becomes "linear" where no value is positive.
        padding: room at either end, as a part of the whole.
    """
    finite = [float(value) for value in values if value is not None and math.isfinite(value)]
    if kind == "log":
        positive = [value for value in finite if value > 0]
        if not positive:
            return scale_of(finite, "linear", padding)
        low, high = math.log10(min(positive)), math.log10(max(positive))
        room = padding * (high - low) if low < high else 0.15
        return Scale(10 ** max(low - room, _LEAST_POWER), 10 ** (high + room), "log")
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    room = padding * (high - low)
    if low == high:
        room = max(0.05 * abs(low), 0.5 if padding == 0 else 0.05)
    return Scale(low - room if kind == "linear" else low, high + room, kind)


def short(value: float) -> str:
    """A round number as short as a tick label should be: 0.05, 1200, 25k, 3M."""
    text = f"{value:.6g}"
    for least, unit, letter in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            text = f"{value / unit:g}{letter}"
            break
    return text.replace("-", "\N{MINUS SIGN}")


def precise(value: float | None, digits: int = 4) -> str:
    """A measured number with its first digits; a dash where there is none."""
    if value is None:
        return "\N{EN DASH}"
    text = f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
    return text.replace("-", "\N{MINUS SIGN}")


_SIDE = 1000


def line(places: np.ndarray, heights: np.ndarray, css: str) -> Markup:
    """A line through points; it is interrupted where a point has no place.

    Args:
        places: (n,), 0 is the left border and 1 the right one.
        heights: (n,), 0 is the lower border and 1 the upper one.
        css: class names.
    """
    drawn, pen = [], "M"
    for x, y in zip(places, heights, strict=True):
        if np.isfinite(x) and np.isfinite(y):
            drawn.append(f"{pen}{_x(x)} {_y(y)}")
            pen = "L"
        else:
            pen = "M"
    return Markup('<path class="line {}" d="{}"/>').format(css, "".join(drawn)) if drawn else Markup("")


def dots(places: np.ndarray, heights: np.ndarray, css: str) -> Markup:
    """A dot at every point that has a place."""
    known = [(x, y) for x, y in zip(places, heights, strict=True) if np.isfinite(x) and np.isfinite(y)]
    drawn = "".join(f"M{_x(x)} {_y(y)}h.01" for x, y in known)
    return Markup('<path class="dot {}" d="{}"/>').format(css, drawn) if drawn else Markup("")


def band(places: np.ndarray, lows: np.ndarray, highs: np.ndarray, css: str) -> Markup:
    """An area between two lines, in one piece for each row of points where both are known."""
    known = np.isfinite(places) & np.isfinite(lows) & np.isfinite(highs)
    drawn = []
    for piece in np.split(np.arange(len(places)), np.flatnonzero(np.diff(known)) + 1):
        if len(piece) > 1 and known[piece[0]]:
            forth = [f"{_x(places[i])} {_y(highs[i])}" for i in piece]
            back = [f"{_x(places[i])} {_y(lows[i])}" for i in reversed(piece)]
            drawn.append(f"M{'L'.join(forth + back)}Z")
    return Markup('<path class="band {}" d="{}"/>').format(css, "".join(drawn)) if drawn else Markup("")


def bar(left: float, right: float, css: str, title: str) -> Markup:
    """A bar over the whole height, with a text that shows where a pointer rests on it."""
    return Markup('<rect class="bar {}" x="{}" y="0" width="{}" height="1000"><title>{}</title></rect>').format(
        css, _x(left), f"{max(right - left, 0) * _SIDE:.1f}", title
    )


def upright(place: float, css: str) -> Markup:
    """A line from the lower to the upper border."""
    return Markup('<path class="upright {}" d="M{} 0V1000"/>').format(css, _x(place))


def across(height: float, css: str) -> Markup:
    """A line from the left to the right border."""
    return Markup('<path class="across {}" d="M0 {}H1000"/>').format(css, _y(height))


def note(place: float, height: float, text: str, css: str) -> Markup:
    """Words beside a point, towards the middle of the chart."""
    side = "before" if place > 0.6 else "after"
    return Markup('<span class="note {} {}" style="left:{};bottom:{}">{}</span>').format(
        side, css, _percent(place), _percent(height), text
    )


def panel(
    y: Scale | None,
    shapes: Iterable[Markup],
    *,
    title: str,
    says: str,
    size: str = "medium",
    x_ticks: Sequence[tuple[float, str]] = (),
    over: Iterable[Markup] = (),
    y_ticks: Sequence[tuple[float, str]] | None = None,
) -> Markup:
    """One coordinate system.

    Args:
        y: its vertical scale; None for one without numbers.
        shapes: SVG, the lowest first.
        title: what is drawn upwards; stands above the panel.
        says: the picture in words, for those who do not see it.
        size: class name that sets the height.
        x_ticks: where to draw upright grid lines.
        over: HTML over the shapes.
        y_ticks: instead of round values of ``y``.
    """
    ticks = y_ticks if y_ticks is not None else y.ticks(4 if size != "tall" else 6) if y else []
    grid = [*(across(place, "grid") for place, _ in ticks), *(upright(place, "grid") for place, _ in x_ticks)]
    labels = Markup("").join(
        Markup('<span style="bottom:{}">{}</span>').format(_percent(place), label) for place, label in ticks
    )
    return Markup(
        '<div class="panel {}"><div class="ytitle">{}</div><div class="yticks" aria-hidden="true">{}</div>'
        '<div class="area"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{}">'
        '{}{}</svg>{}<div class="cross"></div></div></div>'
    ).format(size, title, labels, says, Markup("").join(grid), Markup("").join(shapes), Markup("").join(over))


def foot(ticks: Sequence[tuple[float, str]], label: str) -> Markup:
    """Numbers and name of the horizontal axis, below the lowest panel."""
    numbers = Markup("").join(
        Markup('<span style="left:{}">{}</span>').format(_percent(place), text) for place, text in ticks
    )
    return Markup(
        '<div class="foot"><div class="xticks" aria-hidden="true">{}</div><div class="xlabel">{}</div></div>'
    ).format(numbers, label)


def _x(place: float) -> str:
    return f"{place * _SIDE:.1f}"


def _y(height: float) -> str:
    return f"{(1 - height) * _SIDE:.1f}"


def _percent(place: float) -> str:
    return f"{100 * place:.2f}%"


_COLOURS = 255  # the palette's last place is for cells without a value
_MAP = "viridis"
_PIXELS = 1200  # across: cells are as wide as their evaluations lie apart


def heat_map(edges: np.ndarray, values: np.ndarray, scale: Scale, says: str) -> Markup:
    """A picture of values over layers and evaluations.

    Args:
        edges: (evaluations + 1,) borders of the columns, increasing, from 0 to 1.
        values: (layers, evaluations); NaN stays empty.
        scale: of the colours.
        says: the picture in words.
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
    return Markup('<img class="heat" alt="{}" src="data:image/png;base64,{}">').format(
        says, base64.b64encode(file.getvalue()).decode()
    )


def colour_bar(scale: Scale, label: str) -> Markup:
    """The colours of a scale, with numbers."""
    stops = ", ".join(f"rgb({r:.0f} {g:.0f} {b:.0f})" for r, g, b, _ in 255 * colormaps[_MAP](np.linspace(0, 1, 17)))
    numbers = Markup("").join(
        Markup('<span style="left:{}%">{}</span>').format(f"{100 * place:.2f}", text) for place, text in scale.ticks(4)
    )
    return Markup(
        '<div class="colours"><span class="what">{}</span><div class="scale">'
        '<div class="ramp" style="background:linear-gradient(90deg, {})"></div><div class="xticks">{}</div></div></div>'
    ).format(label, stops, numbers)


def edges_between(places: Sequence[float] | np.ndarray) -> np.ndarray:
    """Borders half way between neighbours; the outer ones at 0 and 1, where the chart ends.

    Args:
        places: (n,) increasing, within 0 to 1; n >= 1.

    Returns:
        (n + 1,) float64.
    """
    known = np.asarray(places, dtype=float)
    middle = (known[1:] + known[:-1]) / 2
    if len(known) == 1:
        return np.array([0.0, 1.0])
    first, last = 2 * known[0] - middle[0], 2 * known[-1] - middle[-1]
    return np.concatenate([[max(first, 0.0)], middle, [min(last, 1.0)]])
