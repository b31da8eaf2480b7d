# SPDX-License-Identifier: Apache-2.0
"""Which differences are beyond their noise, and the ranking that leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from mir_callback.analysis.axes import Point
from mir_callback.analysis.noise import ProbeNoise, RunNoise, probe_noise


@dataclass(frozen=True)
class Difference:
    """MIR of one recipe less that of another, each the mean over the recipe's runs.

    Attributes:
        one: index of the first recipe.
        other: index of the second one.
        value: the difference; negative if the first has the lower MIR.
        se: its standard error, of both noises.
        probe: the part of it that the probe's samples have.
        runs_se: the part of it that runs of one recipe have.
        p: how often noise alone gives a difference as large, if the recipes do not differ.
        p_adjusted: the same for the whole family of differences (Holm), to be compared with the level.
        differs: whether the difference is beyond the noise.
        bearable_sd: the largest standard deviation between runs of one recipe, if it were known, at which it would
            still be, the others being what they are; 0 if it is not even beyond the probe's error.
    """

    one: int
    other: int
    value: float
    se: float
    probe: ProbeNoise
    runs_se: float
    p: float
    p_adjusted: float
    differs: bool
    bearable_sd: float


def differences(
    points: Sequence[Sequence[Point]], noise: RunNoise, level: float, same_probe: Sequence[Sequence[bool]]
) -> list[Difference]:
    """All pairs of recipes, judged together.

    Args:
        points: for each recipe the values of its runs at the place compared.
        noise: between runs of one recipe.
        level: probability of calling any difference in the family real if none is.
        same_probe: for each two recipes whether they were measured on the same probe.

    Ranks: pure.
    """
    found = []
    for one, other in combinations(range(len(points)), 2):
        probe = probe_noise(points[one], points[other], same_probe[one][other])
        parts = [(noise.sds[index] ** 2 / len(points[index]), noise.freedom[index]) for index in (one, other)]
        value = _mean(points[one]) - _mean(points[other])
        se, freedom = _joined([*parts, (probe.se**2, probe.freedom)])
        found.append((one, other, value, se, probe, _joined(parts)[0], _two_sided(value, se, freedom)))
    p_values = [entry[-1] for entry in found]
    adjusted, factors = holm(p_values), holm_factors(p_values)
    counts = [len(values) for values in points]
    return [
        Difference(*entry, p, p < level, _bearable_sd(entry[2], entry[4], level / factor, *entry[:2], counts))
        for entry, p, factor in zip(found, adjusted, factors, strict=True)
    ]


def ranks(count: int, found: Sequence[Difference]) -> list[int]:
    """For each recipe one more than how many are better beyond the noise; equal ranks are ties.

    None is better beyond the noise than those of rank 1. A recipe that is not told from the one with the lowest mean
    can have a higher rank all the same, if it is told from another one.

    Ranks: pure.
    """
    worse = [(pair.other if pair.value < 0 else pair.one) for pair in found if pair.differs]
    return [1 + worse.count(index) for index in range(count)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment: the level holds for the whole family, whichever differences are real. Ranks: pure."""
    factors = holm_factors(p_values)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for index in sorted(range(len(p_values)), key=p_values.__getitem__):
        highest = max(highest, min(1.0, factors[index] * p_values[index]))
        adjusted[index] = highest
    return adjusted


def holm_factors(p_values: Sequence[float]) -> list[int]:
    """By what Holm multiplies each: their number for the smallest, one less for the next. Ranks: pure."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    return [len(order) - order.index(index) for index in range(len(order))]


def _bearable_sd(value: float, probe: ProbeNoise, level: float, one: int, other: int, counts: Sequence[int]) -> float:
    """The standard deviation of a run at which the difference is as large as its noise at this level."""
    from scipy import stats

    left = (value / stats.norm.isf(level / 2)) ** 2 - probe.se**2
    return math.sqrt(max(0.0, left) / (1 / counts[one] + 1 / counts[other]))


def _mean(points: Sequence[Point]) -> float:
    return math.fsum(point.mir for point in points) / len(points)


def _joined(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Standard error of summed variances, and its degrees of freedom after Welch and Satterthwaite."""
    total = math.fsum(variance for variance, _ in parts)
    # Shares of the total, as squares of small variances would vanish.
    uncertain = math.fsum((variance / total) ** 2 / freedom for variance, freedom in parts) if total > 0 else 0.0
    return math.sqrt(total), 1 / uncertain if uncertain > 0 else math.inf


def _two_sided(value: float, se: float, freedom: float) -> float:
    """How often a difference of noise alone is as large, by Student's t."""
    from scipy import stats

    if se == 0:
        return 1.0 if value == 0 else 0.0
    t = abs(value) / se
    return float(2 * (stats.norm.sf(t) if math.isinf(freedom) else stats.t.sf(t, freedom)))
