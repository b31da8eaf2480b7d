# SPDX-License-Identifier: Apache-2.0
"""Which differences are beyond their noise, and the ranking that leaves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from mir_callback.analysis.curves import Curve, Point, interpolate

BAND = 1.96  # standard errors: 95 % of a normal distribution
# What is assumed of runs that differ in the seed only: their standard deviation in MIR, the largest that small real
# trainings had (docs/comparing.md), and the part of the way to a position by which a seed may shift a curve.
ASSUMED_STD = 0.35
ASSUMED_SHIFT = 0.1
# Degrees of freedom that the assumption counts for beside replicates: two seeds sometimes agree by chance and promise
# less noise than there is. A scaled inverse chi-squared prior, whose weight is small enough for five runs to overrule.
ASSUMED_DOF = 0.05
_WINDOW = 7  # evaluations about a position in which scatter and slope are looked for


@dataclass(frozen=True)
class RunNoise:
    """How far runs of one recipe lie apart at the position compared."""

    kind: Literal["replicates", "given", "assumed"]  # of these recipes, by the user, or neither
    stds: tuple[float, ...]  # standard deviation of one run, for each recipe, in MIR
    dof: tuple[float, ...]  # of each of them; infinite unless it comes from replicates
    message: str  # all this as a sentence


@dataclass(frozen=True)
class ProbeNoise:
    """How far a difference would move with other samples in the probe.

    It is "paired" by the samples' influences, or "unpaired", from the standard errors alone, which is too much where
    the samples are the same.
    """

    kind: Literal["paired", "unpaired", "unknown"]
    se: float  # standard error of the difference; 0 where it is unknown
    dof: float = math.inf


@dataclass(frozen=True)
class Difference:
    """MIR of one recipe less that of another, each the mean over the recipe's runs."""

    one: int  # index of the first recipe
    other: int
    value: float  # negative if the first has the lower MIR
    se: float  # standard error of it, of both noises
    probe: ProbeNoise  # the part of it that the probe's samples have
    runs_se: float  # the part of it that runs of one recipe have
    p: float  # how often noise alone gives a difference as large, if the recipes do not differ
    p_adjusted: float  # the same for the whole family of differences (Holm), to be compared with the level
    differs: bool  # whether the difference is beyond the noise
    # The largest standard deviation between runs of one recipe, if it were known, at which it would still be, the
    # others being what they are; 0 if it is not even beyond the probe's error.
    max_seed_std: float


def estimate_run_noise(groups: Sequence[Sequence[Curve]], x: float, given_std: float | None = None) -> RunNoise:
    """The noise between runs of one recipe, for each recipe's curves at ``x``; as given, if it is given.

    With replicates it is the standard deviation within each recipe, in which :data:`ASSUMED_STD` has a small weight. It
    is not pooled, as a recipe with a high learning rate can have ten times that of another; a recipe of one run gets
    the largest of those and of what :func:`assume_std` allows for. Without any it is the latter for each run.
    """
    certain = (math.inf,) * len(groups)
    if given_std is not None:
        message = f"run-to-run noise: standard deviation {given_std:.2g} between runs of one recipe, as given"
        return RunNoise("given", (given_std,) * len(groups), certain, message)
    measured = {
        index: _moderate_std([interpolate(curve, x).mir for curve in curves])
        for index, curves in enumerate(groups)
        if len(curves) > 1
    }
    if not measured:
        stds = tuple(assume_std(curves[0], x) for curves in groups)
        message = (
            f"run-to-run noise: standard deviation {_range(stds)} between runs of one recipe, ASSUMED, as each recipe "
            "has one run only; give replicates (a=run1,run2) or a known value (--seed-std)"
        )
        return RunNoise("assumed", stds, certain, message)
    # A quiet recipe makes one of a single run no quieter, and two that borrow its estimate must not count it twice.
    largest, own_dof = max(measured.values())
    borrowed = [max((largest, own_dof / 2), (assume_std(curves[0], x), math.inf)) for curves in groups]
    stds, dof = zip(*(measured.get(index, lent) for index, lent in enumerate(borrowed)), strict=True)
    message = (
        f"run-to-run noise: standard deviation {_range(stds)} between runs of one recipe, measured on the replicates "
        f"(with a little of an assumed {ASSUMED_STD}, as few runs may agree by chance)"
    )
    if len(measured) < len(groups):
        message += "; recipes of one run get the largest of these, at least what is assumed without replicates"
    return RunNoise("replicates", stds, dof, message)


def assume_std(curve: Curve, x: float) -> float:
    """Standard deviation to allow for between this run and others that differ in the seed only.

    The root of the summed squares of :data:`ASSUMED_STD`; twice the curve's scatter about its smooth trend around the
    position, as what varies from one evaluation to the next varies from run to run all the more; and the curve's slope
    times :data:`ASSUMED_SHIFT` of the way to the position, as a seed makes a run a little faster or slower.
    """
    scatter, slope = _trend(curve, x)
    return math.hypot(ASSUMED_STD, 2 * scatter, slope * ASSUMED_SHIFT * x)


def estimate_probe_noise(one: Sequence[Point], other: Sequence[Point], same_probe: bool) -> ProbeNoise:
    """The probe's sampling error of the difference between two recipes' mean values at the position compared."""
    left, right = _mean_influences(one), _mean_influences(other)
    if same_probe and left is not None and right is not None and left.shape == right.shape and len(left) > 1:
        return ProbeNoise("paired", standard_error(left - right), len(left) - 1)
    errors = []
    for points in (one, other):
        known = [point.se for point in points if point.se is not None]
        if len(known) < len(points):
            return ProbeNoise("unknown", 0.0)
        # That of a mean over runs is that of one run, as the same samples lead all of them astray.
        errors.append(sum(known) / len(known))
    return ProbeNoise("unpaired", math.hypot(*errors))


def standard_error(influences: np.ndarray) -> float:
    """Of (num_samples,) influences, at least 2: as `metric.influence.compute_standard_error`, without torch."""
    return math.sqrt(float(influences.var(ddof=1)) / len(influences))


def find_differences(
    points: Sequence[Sequence[Point]], noise: RunNoise, level: float, same_probe: Sequence[Sequence[bool]]
) -> list[Difference]:
    """All pairs of recipes, judged together, by each recipe's values at the position compared.

    ``level`` is the probability of calling any difference in the family real if none is; ``same_probe`` says of each
    two recipes whether they were measured on the same probe.
    """
    from scipy.special import ndtri  # a tenth of the time that scipy.stats takes to import

    means = [math.fsum(point.mir for point in found) / len(found) for found in points]
    variances = [std**2 / len(found) for std, found in zip(noise.stds, points, strict=True)]
    tested = []
    for one, other in combinations(range(len(points)), 2):
        probe = estimate_probe_noise(points[one], points[other], same_probe[one][other])
        runs = [(variances[index], noise.dof[index]) for index in (one, other)]
        value = means[one] - means[other]
        se, dof = _join([*runs, (probe.se**2, probe.dof)])
        tested.append((one, other, value, se, probe, _join(runs)[0], _two_sided_p(value, se, dof)))
    p_values = [entry[-1] for entry in tested]
    found = []
    for entry, p, factor in zip(tested, adjust_by_holm(p_values), _holm_factors(p_values), strict=True):
        one, other, value, _, probe, _, _ = entry
        max_se = value / float(ndtri(level / factor / 2))
        runs_alone = max(0.0, max_se**2 - probe.se**2)
        max_seed_std = math.sqrt(runs_alone / (1 / len(points[one]) + 1 / len(points[other])))
        found.append(Difference(*entry, p, p < level, max_seed_std))
    return found


def rank(count: int, found: Sequence[Difference]) -> list[int]:
    """For each recipe one more than how many are better beyond the noise; equal ranks are ties.

    None is better beyond the noise than those of rank 1. A recipe that is not told from the one with the lowest mean
    can have a higher rank all the same, if it is told from another one.
    """
    worse = [(pair.other if pair.value < 0 else pair.one) for pair in found if pair.differs]
    return [1 + worse.count(index) for index in range(count)]


def adjust_by_holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment: the level holds for the whole family, whichever differences are real."""
    factors = _holm_factors(p_values)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for index in sorted(range(len(p_values)), key=p_values.__getitem__):
        highest = max(highest, min(1.0, factors[index] * p_values[index]))
        adjusted[index] = highest
    return adjusted


def _holm_factors(p_values: Sequence[float]) -> list[int]:
    """By what Holm multiplies each: their number for the smallest, one less for the next."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    return [len(order) - order.index(index) for index in range(len(order))]


def _moderate_std(values: Sequence[float]) -> tuple[float, float]:
    """Standard deviation of replicates with the assumption's small weight, and its degrees of freedom."""
    squares, dof = float(np.var(values)) * len(values), len(values) - 1 + ASSUMED_DOF
    return math.sqrt((squares + ASSUMED_DOF * ASSUMED_STD**2) / dof), dof


def _range(stds: Sequence[float]) -> str:
    least, most = f"{min(stds):.2g}", f"{max(stds):.2g}"
    return least if least == most else f"{least} to {most}"


def _trend(curve: Curve, x: float) -> tuple[float, float]:
    """Scatter about a parabola through the evaluations nearest to a position, and the parabola's slope there."""
    if len(curve.x) < 2:
        return 0.0, 0.0
    away, values = np.array(curve.x) - x, np.array([record.mir for record in curve.records], dtype=float)
    nearest = np.sort(np.argsort(np.abs(away), kind="stable")[:_WINDOW])
    away, values = away[nearest], values[nearest]
    degree = min(2, len(away) - 1)
    fit = np.polynomial.Polynomial.fit(away, values, degree)
    dof = len(away) - degree - 1
    scatter = math.sqrt(float(np.sum((values - fit(away)) ** 2)) / dof) if dof > 0 else 0.0
    return scatter, abs(float(fit.deriv()(0.0)))


def _mean_influences(points: Sequence[Point]) -> np.ndarray | None:
    known = [point.influences for point in points if point.influences is not None]
    if len(known) < len(points) or len({len(values) for values in known}) > 1:
        return None
    mean: np.ndarray = np.mean(known, axis=0)
    return mean


def _join(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Standard error of summed variances, and its degrees of freedom after Welch and Satterthwaite."""
    total = math.fsum(variance for variance, _ in parts)
    # Shares of the total, as squares of small variances would vanish.
    uncertain = math.fsum((variance / total) ** 2 / dof for variance, dof in parts) if total > 0 else 0.0
    return math.sqrt(total), 1 / uncertain if uncertain > 0 else math.inf


def _two_sided_p(value: float, se: float, dof: float) -> float:
    """How often a difference of noise alone is as large, by Student's t."""
    from scipy.special import ndtr, stdtr

    if se == 0:
        return 1.0 if value == 0 else 0.0
    t = abs(value) / se
    return float(2 * (ndtr(-t) if math.isinf(dof) else stdtr(dof, -t)))
