# SPDX-License-Identifier: Apache-2.0
"""Which differences are beyond noise, and the ranking that follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from mir_callback.analysis.curves import Curve, Point, interpolate

BAND = 1.96  # standard errors: 95 % of a normal distribution
# Assumed for runs that differ only in the seed: their standard deviation in MIR, the largest that small real trainings
# had (docs/comparing.md), and by what fraction of the way to a position a seed may shift a curve.
ASSUMED_STD = 0.35
ASSUMED_SHIFT = 0.1
# Degrees of freedom of the assumption when there are replicates, as a scaled inverse chi-squared prior: two seeds may
# agree by chance and suggest too little noise. Its weight is small enough to be overruled by five runs.
ASSUMED_DOF = 0.05
_WINDOW = 7  # evaluations around a position that scatter and slope are estimated from


@dataclass(frozen=True)
class RunNoise:
    """The noise between runs of one recipe at the position compared."""

    kind: Literal["replicates", "given", "assumed"]  # how it was determined
    stds: tuple[float, ...]  # standard deviation of a run's MIR, for each recipe
    dof: tuple[float, ...]  # degrees of freedom of each; infinite unless from replicates
    message: str  # the same for people


@dataclass(frozen=True)
class ProbeNoise:
    """The part of a difference's noise that comes from the choice of the probe's samples.

    "paired" by the samples' influences, or "unpaired" from the standard errors, which overestimates it on one probe.
    """

    kind: Literal["paired", "unpaired", "unknown"]
    se: float  # standard error of the difference; 0 if unknown
    dof: float = math.inf


@dataclass(frozen=True)
class Difference:
    """MIR of one recipe minus that of another, each the mean over its runs."""

    one: int  # index of the first recipe
    other: int
    value: float  # negative if the first has the lower MIR
    se: float  # its standard error, from probe and runs
    probe: ProbeNoise
    runs_se: float  # the part of se that comes from the noise between runs
    p: float  # two-sided p-value
    p_adjusted: float  # p-value adjusted for all differences (Holm), to be compared with the level
    differs: bool  # whether it is significant at the level
    # The difference would be significant up to this standard deviation between seeds, if that were known; 0 if the
    # error of the probe alone is too large.
    max_seed_std: float


def estimate_run_noise(groups: Sequence[Sequence[Curve]], x: float, given_std: float | None = None) -> RunNoise:
    """The noise between runs of one recipe at ``x``, for each recipe's curves; ``given_std`` if given.

    Recipes of several runs get their own standard deviation, with a small weight of :data:`ASSUMED_STD`; it is not
    pooled, as recipes can differ by a factor of ten. A recipe of one run gets the largest of these, or that of
    :func:`assume_std` if it is larger or there are no others.
    """
    certain = (math.inf,) * len(groups)
    if given_std is not None:
        message = f"noise between seeds: standard deviation {given_std:.2g}, as given (--seed-std)"
        return RunNoise("given", (given_std,) * len(groups), certain, message)
    measured = {
        index: _moderate_std([interpolate(curve, x).mir for curve in curves])
        for index, curves in enumerate(groups)
        if len(curves) > 1
    }
    if not measured:
        stds = tuple(assume_std(curves[0], x) for curves in groups)
        message = (
            f"noise between seeds: standard deviation {_range(stds)}, ASSUMED, as each recipe has only one run; pass "
            "several seeds (a=run1,run2) or a known value (--seed-std)"
        )
        return RunNoise("assumed", stds, certain, message)
    # Half the degrees of freedom, as two recipes may use the same estimate.
    largest, own_dof = max(measured.values())
    borrowed = [max((largest, own_dof / 2), (assume_std(curves[0], x), math.inf)) for curves in groups]
    stds, dof = zip(*(measured.get(index, lent) for index, lent in enumerate(borrowed)), strict=True)
    message = (
        f"noise between seeds: standard deviation {_range(stds)}, measured on recipes of several runs (with a small "
        f"weight of an assumed {ASSUMED_STD}, as few runs may agree by chance)"
    )
    if len(measured) < len(groups):
        message += "; recipes of one run get the largest of these or of what is assumed for single runs"
    return RunNoise("replicates", stds, dof, message)


def assume_std(curve: Curve, x: float) -> float:
    """The standard deviation assumed between this run and others that differ only in the seed.

    It combines (root of summed squares) :data:`ASSUMED_STD`; twice the curve's scatter about its trend around ``x``, as
    runs vary at least as much as evaluations of one run; and the slope times :data:`ASSUMED_SHIFT` of ``x``, as a seed
    makes a run a little faster or slower.
    """
    scatter, slope = _trend(curve, x)
    return math.hypot(ASSUMED_STD, 2 * scatter, slope * ASSUMED_SHIFT * x)


def estimate_probe_noise(one: Sequence[Point], other: Sequence[Point], same_probe: bool) -> ProbeNoise:
    """The sampling error of the probe in the difference between two recipes' mean values."""
    left, right = _mean_influences(one), _mean_influences(other)
    if same_probe and left is not None and right is not None and left.shape == right.shape and len(left) > 1:
        return ProbeNoise("paired", standard_error(left - right), len(left) - 1)
    errors = []
    for points in (one, other):
        known = [point.se for point in points if point.se is not None]
        if len(known) < len(points):
            return ProbeNoise("unknown", 0.0)
        # Not divided by the number of runs: they share the samples, and so the error.
        errors.append(sum(known) / len(known))
    return ProbeNoise("unpaired", math.hypot(*errors))


def standard_error(influences: np.ndarray) -> float:
    """From (num_samples,) influences, at least 2; `metric.influence.compute_standard_error` without torch."""
    return math.sqrt(float(influences.var(ddof=1)) / len(influences))


def find_differences(
    points: Sequence[Sequence[Point]], noise: RunNoise, level: float, same_probe: Sequence[Sequence[bool]]
) -> list[Difference]:
    """Test the differences between all pairs of recipes, given each recipe's values at the position compared.

    ``level`` is the probability of calling any difference significant if there is none; ``same_probe[i][j]`` says
    whether two recipes were measured on the same probe.
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
    """The rank of each recipe: 1 plus the number of recipes that are significantly better; equal ranks are ties.

    A recipe that does not differ significantly from the lowest can still rank behind it, if it does from another one.
    """
    worse = [(pair.other if pair.value < 0 else pair.one) for pair in found if pair.differs]
    return [1 + worse.count(index) for index in range(count)]


def adjust_by_holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment, which controls the family-wise error rate."""
    factors = _holm_factors(p_values)
    adjusted, highest = [0.0] * len(p_values), 0.0
    for index in sorted(range(len(p_values)), key=p_values.__getitem__):
        highest = max(highest, min(1.0, factors[index] * p_values[index]))
        adjusted[index] = highest
    return adjusted


def _holm_factors(p_values: Sequence[float]) -> list[int]:
    """Holm's factor of each p-value: their number for the smallest, one less for the next, and so on."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    return [len(order) - order.index(index) for index in range(len(order))]


def _moderate_std(values: Sequence[float]) -> tuple[float, float]:
    """Standard deviation of replicates, moderated by the assumed one, and its degrees of freedom."""
    squares, dof = float(np.var(values)) * len(values), len(values) - 1 + ASSUMED_DOF
    return math.sqrt((squares + ASSUMED_DOF * ASSUMED_STD**2) / dof), dof


def _range(stds: Sequence[float]) -> str:
    least, most = f"{min(stds):.2g}", f"{max(stds):.2g}"
    return least if least == most else f"{least} to {most}"


def _trend(curve: Curve, x: float) -> tuple[float, float]:
    """Scatter of the nearest evaluations around a fitted parabola, and its slope at ``x``."""
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
    """Standard error from summed variances, and its degrees of freedom (Welch-Satterthwaite)."""
    total = math.fsum(variance for variance, _ in parts)
    # Relative to the total, as squares of small variances could underflow.
    uncertain = math.fsum((variance / total) ** 2 / dof for variance, dof in parts) if total > 0 else 0.0
    return math.sqrt(total), 1 / uncertain if uncertain > 0 else math.inf


def _two_sided_p(value: float, se: float, dof: float) -> float:
    """Two-sided p-value by Student's t."""
    from scipy.special import ndtr, stdtr

    if se == 0:
        return 1.0 if value == 0 else 0.0
    t = abs(value) / se
    return float(2 * (ndtr(-t) if math.isinf(dof) else stdtr(dof, -t)))
