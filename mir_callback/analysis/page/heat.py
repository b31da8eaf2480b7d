# SPDX-License-Identifier: Apache-2.0
"""Heat maps: layers upwards, evaluations to the right, as a small picture that the page stretches."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from PIL import Image

from mir_callback.analysis.page.scales import Scale

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
