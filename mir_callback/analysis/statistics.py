# SPDX-License-Identifier: Apache-2.0
"""Which differences are beyond their noise, and the ranking that leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import torch

from mir_callback.analysis.curves import Curve, Point, value_at
from mir_callback.metric.influence import compute_standard_error

# What is assumed of runs that differ in the seed only: their standard deviation in MIR, the largest that small real
# trainings had (docs/comparing.md), and the part of the way to a place by which a seed may shift a curve.
ASSUMED_SD = 0.35
ASSUMED_SHIFT = 0.1
# Degrees of freedom that the assumption counts for beside replicates: two seeds sometimes agree by chance and promise
# less noise than there is. A scaled inverse chi-squared prior, whose weight is small enough for five runs to overrule.
ASSUMED_FREEDOM = 0.05
_WINDOW = 7  # evaluations about a place in which scatter and slope are looked for


@dataclass(frozen=True)
class RunNoise:
    """How far runs of one recipe lie apart at the place compared.

    Attributes:
        kind: where it comes from: "replicates" of these recipes, "given" by the user, or "assumed".
        sds: standard deviation of one run, for each recipe, in MIR.
        freedom: degrees of freedom of each of them; infinite unless it comes from replicates.
        told: this as a sentence.
    """

    kind: Literal["replicates", "given", "assumed"]
    sds: tuple[float, ...]
    freedom: tuple[float, ...]
    told: str


@dataclass(frozen=True)
class ProbeNoise:
    """How far a difference would move with other samples in the probe.

    Attributes:
        kind: "paired" by the samples' influences; "unpaired", from the standard errors alone, which is too much where
            the samples are the same; or "unknown".
        se: standard error of the difference; 0 where it is unknown.
        freedom: its degrees of freedom.
    """

    kind: Literal["paired", "unpaired", "unknown"]
    se: float
    freedom: float = math.inf


def run_noise(groups: Sequence[Sequence[Curve]], place: float, given_sd: float | None = None) -> RunNoise:
    """The noise between runs of one recipe.

    Args:
        groups: for each recipe the curves of its runs, which all cover ``place``.
        place: where they are compared.
        given_sd: a standard deviation that is known from elsewhere; goes before everything else.

    Returns:
        With replicates: the standard deviation within each recipe, in which :data:`ASSUMED_SD` has a small weight. It
        is not pooled, as a recipe with a high learning rate can have ten times that of another; a recipe of one run
        gets the largest of those and of what :func:`assumed_sd` allows for. Without any: the latter for each run.

    Ranks: pure.
    """
    certain = (math.inf,) * len(groups)
    if given_sd is not None:
        told = f"run-to-run noise: standard deviation {given_sd:.2g} between runs of one recipe, as given"
        return RunNoise("given", (given_sd,) * len(groups), certain, told)
    values = [[value_at(curve, place).mir for curve in curves] for curves in groups]
    measured = [_moderated_sd(found) for found in values if len(found) > 1]
    if measured:
        each = [
            _moderated_sd(found) if len(found) > 1 else _borrowed_sd(measured, assumed_sd(curves[0], place))
            for found, curves in zip(values, groups, strict=True)
        ]
        told = (
            f"run-to-run noise: standard deviation {_range([sd for sd, _ in each])} between runs of one recipe, "
            f"measured on the replicates (with a little of an assumed {ASSUMED_SD}, as few runs may agree by chance)"
        )
        if len(measured) < len(groups):
            told += "; recipes of one run get the largest of these, at least what is assumed without replicates"
        return RunNoise("replicates", tuple(sd for sd, _ in each), tuple(freedom for _, freedom in each), told)
    sds = tuple(assumed_sd(curves[0], place) for curves in groups)
    told = (
        f"run-to-run noise: standard deviation {_range(sds)} between runs of one recipe, ASSUMED, as each recipe has "
        "one run only; give replicates (a=run1,run2) or a known value (--seed-sd)"
    )
    return RunNoise("assumed", sds, certain, told)


def assumed_sd(curve: Curve, place: float) -> float:
    """Standard deviation to allow for between this run and others that differ in the seed only.

    The root of the summed squares of :data:`ASSUMED_SD`; twice the curve's scatter about its smooth trend around the
    place, as what varies from one evaluation to the next varies from run to run all the more; and the curve's slope
    times :data:`ASSUMED_SHIFT` of the way to the place, as a seed makes a run a little faster or slower.

    Ranks: pure.
    """
    scatter, slope = _trend(curve, place)
    return math.hypot(ASSUMED_SD, 2 * scatter, slope * ASSUMED_SHIFT * place)


def probe_noise(one: Sequence[Point], other: Sequence[Point], same_probe: bool) -> ProbeNoise:
    """The probe's sampling error of the difference between two recipes' mean values.

    Args:
        one: the values of one recipe's runs at the place compared.
        other: those of the other recipe.
        same_probe: whether all were measured on the same probe.

    Ranks: pure.
    """
    influences = [_mean_influences(points) for points in (one, other)]
    left, right = influences
    if same_probe and left is not None and right is not None and left.shape == right.shape and len(left) > 1:
        return ProbeNoise("paired", compute_standard_error(torch.from_numpy(left - right)).item(), len(left) - 1)
    ses = [_mean_se(points) for points in (one, other)]
    if ses[0] is None or ses[1] is None:
        return ProbeNoise("unknown", 0.0)
    return ProbeNoise("unpaired", math.hypot(ses[0], ses[1]))


def _moderated_sd(values: Sequence[float]) -> tuple[float, float]:
    """Standard deviation of replicates with the assumption's small weight, and its degrees of freedom."""
    squares, freedom = float(np.var(values)) * len(values), len(values) - 1 + ASSUMED_FREEDOM
    return math.sqrt((squares + ASSUMED_FREEDOM * ASSUMED_SD**2) / freedom), freedom


def _borrowed_sd(measured: Sequence[tuple[float, float]], assumed: float) -> tuple[float, float]:
    """For a recipe of one run, whose own noise nothing tells: a quiet recipe beside it makes it no quieter."""
    sd, freedom = max(measured)
    # Two recipes that borrow the same estimate must not count it twice.
    return (sd, freedom / 2) if sd > assumed else (assumed, math.inf)


def _range(sds: Sequence[float]) -> str:
    least, most = f"{min(sds):.2g}", f"{max(sds):.2g}"
    return least if least == most else f"{least} to {most}"


def _mean_influences(points: Sequence[Point]) -> np.ndarray | None:
    known = [point.influences for point in points if point.influences is not None]
    if len(known) < len(points) or len({len(values) for values in known}) > 1:
        return None
    mean: np.ndarray = np.mean(known, axis=0)
    return mean


def _mean_se(points: Sequence[Point]) -> float | None:
    """Standard error of a mean over runs: that of one run, as the same samples lead all of them astray."""
    known = [point.se for point in points if point.se is not None]
    return sum(known) / len(known) if len(known) == len(points) else None


def _trend(curve: Curve, place: float) -> tuple[float, float]:
    """Scatter about a parabola through the evaluations nearest to a place, and the parabola's slope there."""
    places, values = np.array(curve.places), np.array([record["mir"] for record in curve.records], dtype=float)
    if len(places) < 2:
        return 0.0, 0.0
    nearest = np.sort(np.argsort(np.abs(places - place), kind="stable")[:_WINDOW])
    near, values = places[nearest] - place, values[nearest]
    degree = min(2, len(near) - 1)
    fit = np.polynomial.Polynomial.fit(near, values, degree)
    freedom = len(near) - degree - 1
    scatter = math.sqrt(float(np.sum((values - fit(near)) ** 2)) / freedom) if freedom > 0 else 0.0
    return scatter, abs(float(fit.deriv()(0.0)))


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
