# SPDX-License-Identifier: Apache-2.0
"""The trend at the end of a curve, and how well it is known: a robust line, and noise from what lies beside it.

Arrays are float64. Everything here is pure and cheap: a window is some tens of points.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Median of the square of a standard normal variable, and standard deviation over median absolute deviation.
_MEDIAN_SQUARE = 0.4549364
_PER_MAD = 1.4826


def slope(x: Array, y: Array) -> float:
    """Theil-Sen: the median of the slopes through every two points.

    A line by least squares leans on whatever stands at the ends of its window, where the corner of a curve and a
    single outlier do the most harm; this one ignores up to 29 % of the points.

    Args:
        x: (N,), increasing.
        y: (N,), N at least 2.
    """
    later, earlier = _pairs(len(x))
    return float(np.median((y[later] - y[earlier]) / (x[later] - x[earlier])))


def scatter(x: Array, y: Array) -> float:
    """Standard deviation of independent noise around a smooth curve, whatever the curve.

    Each point is compared with the line through its two neighbours. What counts is the median of the squares: not a few
    outliers, nor a steep stretch.

    Args:
        x: (N,), increasing.
        y: (N,); 0 for N below 3.
    """
    if len(x) < 3:
        return 0.0
    part = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    beside = y[1:-1] - (1 - part) * y[:-2] - part * y[2:]
    return math.sqrt(float(np.median(beside**2 / (1 + part**2 + (1 - part) ** 2))) / _MEDIAN_SQUARE)


def lasting_scatter(x: Array, y: Array, block: int) -> float:
    """As :func:`scatter`, for noise that lingers over up to ``block`` points.

    It is the scatter of independent noise whose means over that many points vary as much.

    Args:
        x: (N,), increasing.
        y: (N,).
        block: most points in a mean, at least 1; all smaller numbers count as well.
    """
    found = [scatter(x, y)]
    for size in range(2, block + 1):
        count = len(x) // size
        means = [values[len(x) - count * size :].reshape(count, size).mean(axis=1) for values in (x, y)]
        found.append(math.sqrt(size) * scatter(*means))
    return max(found)


def residual_scatter(x: Array, y: Array, slope: float) -> float:
    """Robust standard deviation of the points around a line with this slope; what noise that lingers adds shows here.

    Args:
        x: (N,).
        y: (N,), N at least 3.
        slope: of the line.
    """
    beside = y - slope * x
    beside = beside - np.median(beside)
    return _PER_MAD * float(np.median(np.abs(beside))) * math.sqrt(len(x) / (len(x) - 2))


def spread(x: Array) -> float:
    """Square root of the sum of squares about the mean: noise over this is the standard error of a slope."""
    return float(np.linalg.norm(x - x.mean()))


def window_for(x: Array, noise: float, error: float, least: int, most: int) -> int:
    """How many of the last points a line needs for its slope to be known to ``error``.

    Args:
        x: (N,), increasing, N at least ``least``.
        noise: standard deviation of a point.
        error: standard error wanted of the slope.
        least: fewest points; what is returned where they do.
        most: most points; what is returned, or N, where no number is enough.
    """
    most = min(most, len(x))
    back = x[::-1][:most] - x[-1]
    count = np.arange(1, most + 1)
    squares = np.cumsum(back**2) - np.cumsum(back) ** 2 / count
    enough = np.flatnonzero(noise**2 <= squares * error**2) + 1
    enough = enough[enough >= least]
    return int(enough[0]) if len(enough) else most


def paired_error(x: Array, influences: Array) -> float:
    """Standard error of a slope from the choice of the probe's samples, by their influences on every value.

    The error of a single value (`mir_se`) is of no use here: the samples are the same in every evaluation, and what
    they have in common cancels in a slope. What is left is how differently the samples move.

    Args:
        x: (N,) of the values.
        influences: (N, S), of each sample on each value; S at least 2.
    """
    weights = (x - x.mean()) / spread(x) ** 2
    of_slope = weights @ influences  # (S,)
    return float(of_slope.std(ddof=1)) / math.sqrt(influences.shape[1])


def level_above_best(y: Array, window: int) -> float:
    """How far the mean of the last points lies above the lowest mean of half as many in a row.

    Args:
        y: (N,), N at least ``window``.
        window: how many the last ones are, at least 2.
    """
    half = window // 2
    sums = np.cumsum(np.concatenate([[0.0], y]))
    return float(y[-window:].mean() - ((sums[half:] - sums[:-half]) / half).min())


def _pairs(count: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    later, earlier = np.tril_indices(count, -1)
    return later, earlier
