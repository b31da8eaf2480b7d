# SPDX-License-Identifier: Apache-2.0
"""Parts of a chart. Shapes are SVG that stretches with the page; labels are HTML, and keep their size.

All shapes lie in a square of 1000 x 1000 whose sides stretch on their own; line widths do not (`page.css`). So a chart
fits any width without a script, and dots stay round: a dot is a line of no length with round ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from markupsafe import Markup

from mir_callback.analysis.page.scales import Scale

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
