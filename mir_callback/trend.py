# SPDX-License-Identifier: Apache-2.0
"""The trend of a curve under noise: a robust line, its standard error, evaluations put together. Pure, numpy only."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Median of the square of a standard normal variable, and standard deviation over median absolute deviation.
_MEDIAN_SQUARE = 0.4549364
_PER_MAD = 1.4826


def median(values: Array) -> float:
    """As np.median of a one-dimensional array without NaN, ten times as fast for a short one."""
    ordered = np.sort(values)
    return float(ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def theil_sen_slope(x: Array, y: Array) -> float:
    """The Theil-Sen estimate: the median of the slopes through every two points.

    Least squares gives most weight to the ends of the window, where a bend of the curve or one outlier does the most
    harm; this estimate tolerates up to 29 % of outliers.
    """
    later, earlier = _pairs(len(x))
    return median((y[later] - y[earlier]) / (x[later] - x[earlier]))


def scatter(x: Array, y: Array) -> float:
    """Standard deviation of independent noise around a smooth curve, whatever the curve.

    Each point is compared with the line through its two neighbours; the median of the squares ignores a few outliers
    and a steep stretch. 0 for fewer than 3 points.
    """
    if len(x) < 3:
        return 0.0
    part = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    beside = y[1:-1] - (1 - part) * y[:-2] - part * y[2:]
    return math.sqrt(median(beside**2 / (1 + part**2 + (1 - part) ** 2)) / _MEDIAN_SQUARE)


def residual_scatter(x: Array, y: Array, slope: float) -> float:
    """Robust standard deviation of 3 points or more around a line with this slope; sees autocorrelated noise too."""
    beside = y - slope * x
    beside = beside - median(beside)
    return _PER_MAD * median(np.abs(beside)) * math.sqrt(len(x) / (len(x) - 2))


def spread(x: Array) -> float:
    """Square root of the sum of squares about the mean; noise divided by it is the standard error of a slope."""
    return float(np.linalg.norm(x - x.mean()))


def window_for(x: Array, noise: float, error: float, least: int, most: int) -> int:
    """How many of the last points a line needs for its slope to have a standard error of at most ``error``.

    At least ``least``; if no number is enough, ``most`` or all there are. ``noise`` is the standard deviation of a
    point.
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

    The samples are the same in every evaluation, so what they share cancels in a slope, and the error of a single value
    (`mir_se`) would be far too large. ``influences`` is (N evaluations, S samples).
    """
    weights = (x - x.mean()) / spread(x) ** 2
    of_slope = weights @ influences  # (S,)
    return float(of_slope.std(ddof=1)) / math.sqrt(influences.shape[1])


def level_above_best(y: Array, window: int) -> float:
    """How far the mean of the last ``window`` points lies above the lowest mean of half as many in a row."""
    half = window // 2
    sums = np.cumsum(np.concatenate([[0.0], y]))
    return float(y[-window:].mean() - ((sums[half:] - sums[:-half]) / half).min())


@lru_cache(maxsize=256)
def _pairs(count: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    later, earlier = np.tril_indices(count, -1)
    return later, earlier


class Cells:
    """Evaluations put together in equal parts of the run, so that a line sees the same however many there are.

    Args:
        steps: (N,) of the evaluations, increasing.
        values: (N,) their MIR.
        segment: (N,) evaluations with different numbers are not put together.
        width: steps a part; with 0 each evaluation stays by itself.

    Attributes:
        of: (N,) the cell of each evaluation.
        first: (M + 1,) the first evaluation of each cell, and N.
        x: (M,) mean step of each cell.
        y: (M,) median of its values.
    """

    def __init__(self, steps: Array, values: Array, segment: NDArray[np.intp], width: float) -> None:
        self._steps, self._values, self._width = steps, values, width
        part = np.ceil(steps / width) if width else np.arange(len(steps))
        begins = np.ones(len(steps), dtype=bool)
        begins[1:] = (np.diff(part) != 0) | (np.diff(segment) != 0)
        self.of = np.cumsum(begins) - 1
        first = np.flatnonzero(begins)
        self.first = np.append(first, len(steps))
        counts = np.diff(self.first)
        ordered = values[np.lexsort((values, self.of))]
        self.x = np.add.reduceat(steps, first) / counts
        self.y = (ordered[first + (counts - 1) // 2] + ordered[first + counts // 2]) / 2

    def settled(self, count: int) -> int:
        """How many of the first ``count`` evaluations lie in cells that the next one, as far again, will not be in."""
        last = self._steps[count - 1]
        gap = last - self._steps[count - 2] if count > 1 else math.inf
        is_open = self._width > 0 and last + gap <= math.ceil(last / self._width) * self._width
        return int(self.first[self.of[count - 1]]) if is_open else count

    def until(self, begin: int, end: int) -> tuple[Array, Array]:
        """(K,) x and (K,) y of the cells of evaluations ``begin`` to ``end``, as if there were none after."""
        first, last = self.of[begin], self.of[end - 1]
        x, y = self.x[first : last + 1], self.y[first : last + 1]
        if self.first[last + 1] > end:
            inside = slice(self.first[last], end)
            x = np.append(x[:-1], self._steps[inside].mean())
            y = np.append(y[:-1], median(self._values[inside]))
        return x, y
