# SPDX-License-Identifier: Apache-2.0
"""Which differences are beyond noise, and the ranking that follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np

from mir_callback.analysis.curves import Point
from mir_callback.analysis.load import Seed

BAND = 1.96  # standard errors: 95 % of a normal distribution


@dataclass(frozen=True)
class Noise:
    """One part of a difference's noise: from the choice of the probe's samples, or from the seeds of the runs.

    Of the probe it is "paired" by the samples' influences, or "unpaired" from the standard errors, which overestimates
    it on one probe. Of the seeds it is "paired" from the differences between runs of the same seed, "unpaired" from
    each recipe's runs, or "given".
    """

    kind: Literal["paired", "unpaired", "given", "unknown"]
    se: float = 0.0  # standard error of the difference; 0 if unknown
    dof: float = math.inf


@dataclass(frozen=True)
class Difference:
    """MIR of one recipe minus that of another, each the mean over its runs; if paired by seed, over those of it."""

    one: int  # index of the first recipe
    other: int
    value: float  # negative if the first has the lower MIR
    probe: Noise
    seeds: Noise
    shared: tuple[Seed, ...] = ()  # the seeds that it is paired by
    # None if it can't be tested, as a recipe has a single run and the noise of seeds is unknown:
    se: float | None = None  # standard error, from probe and seeds
    p: float | None = None  # two-sided p-value
    p_adjusted: float | None = None  # p-value adjusted for all differences tested (Holm), to be compared with the level
    differs: bool = False  # whether it is significant at the level
    # If it can't be tested: it would be significant up to this standard deviation between seeds, if that were known; 0
    # if the error of the probe alone is too large.
    max_seed_std: float | None = None


def find_differences(
    points: Sequence[Sequence[Point]],
    seeds: Sequence[Sequence[Seed | None]],
    level: float,
    same_probe: Sequence[Sequence[bool]],
    given_std: float | None = None,
) -> list[Difference]:
    """The differences between all pairs of recipes, tested where they can be.

    Args:
        points: of each recipe, the values of its runs at the position compared.
        seeds: of each recipe, the seeds of its runs; None if unknown.
        level: probability of calling any difference significant if there is none.
        same_probe: ``same_probe[i][j]`` says whether two recipes were measured on the same probe.
        given_std: standard deviation between seeds, if known.
    """
    found = []
    pairs = list(combinations(range(len(points)), 2))
    for one, other in pairs:
        left, right = points[one], points[other]
        shared = share_seeds(seeds[one], seeds[other]) if given_std is None else ()
        if shared:
            left = [left[seeds[one].index(seed)] for seed in shared]
            right = [right[seeds[other].index(seed)] for seed in shared]
        probe = estimate_probe_noise(left, right, same_probe[one][other])
        noise = estimate_seed_noise(left, right, bool(shared), given_std)
        pair = Difference(one, other, _mean(left) - _mean(right), probe, noise, shared)
        if noise.kind == "unknown":
            largest = abs(pair.value) / _quantile(level / len(pairs), probe.dof)
            runs_alone = math.sqrt(max(0.0, largest**2 - probe.se**2))
            pair = replace(pair, max_seed_std=runs_alone / math.sqrt(1 / len(left) + 1 / len(right)))
        else:
            se = math.hypot(noise.se, probe.se)
            # The fewest degrees of freedom of the parts never promise too much, whatever the parts' shares are; those
            # of Welch and Satterthwaite do, with few runs (benchmarks/results/comparing.md).
            pair = replace(pair, se=se, p=_two_sided_p(pair.value, se, min(noise.dof, probe.dof)))
        found.append(pair)
    adjusted = iter(adjust_by_holm([pair.p for pair in found if pair.p is not None]))
    return [
        pair if pair.p is None else replace(pair, p_adjusted=(p := next(adjusted)), differs=p < level) for pair in found
    ]


def share_seeds(one: Sequence[Seed | None], other: Sequence[Seed | None]) -> tuple[Seed, ...]:
    """The seeds that pair two recipes' runs: two or more; none if one is unknown, or twice in a recipe."""
    known = [{seed for seed in seeds if seed is not None} for seeds in (one, other)]
    if [len(seeds) for seeds in known] != [len(one), len(other)]:
        return ()
    shared = sorted(known[0] & known[1], key=lambda seed: (seed[0], seed[1] or 0))
    return tuple(shared) if len(shared) > 1 else ()


def estimate_seed_noise(
    one: Sequence[Point], other: Sequence[Point], paired: bool, given_std: float | None = None
) -> Noise:
    """The noise between seeds in the difference between two recipes' mean values; ``paired`` if runs share seeds.

    Standard deviations are not pooled over recipes, nor those of paired differences over pairs: they can differ by a
    factor of ten.
    """
    counts = len(one), len(other)
    if given_std is not None:
        return Noise("given", given_std * math.sqrt(1 / counts[0] + 1 / counts[1]))
    if min(counts) < 2:
        return Noise("unknown")
    left, right = (np.array([point.mir for point in points]) for points in (one, other))
    if paired:
        return Noise("paired", standard_error(left - right), min(counts) - 1)
    return Noise("unpaired", math.hypot(standard_error(left), standard_error(right)), min(counts) - 1)


def estimate_probe_noise(one: Sequence[Point], other: Sequence[Point], same_probe: bool) -> Noise:
    """The sampling error of the probe in the difference between two recipes' mean values."""
    left, right = _mean_influences(one), _mean_influences(other)
    if same_probe and left is not None and right is not None and left.shape == right.shape and len(left) > 1:
        return Noise("paired", standard_error(left - right), len(left) - 1)
    errors = []
    for points in (one, other):
        known = [point.se for point in points if point.se is not None]
        if len(known) < len(points):
            return Noise("unknown")
        # Not divided by the number of runs: they share the samples, and so the error.
        errors.append(sum(known) / len(known))
    return Noise("unpaired", math.hypot(*errors))


def standard_error(values: np.ndarray) -> float:
    """Of the mean of at least 2 values, or of MIR from the influences of its samples, (n,) float64.

    `metric.influence.compute_standard_error` without torch.
    """
    return math.sqrt(float(values.var(ddof=1)) / len(values))


def rank(count: int, found: Sequence[Difference]) -> list[int | None]:
    """The rank of each recipe: 1 plus the number of recipes that are significantly better; equal ranks are ties.

    None for a recipe that could not be tested against any. A recipe that does not differ significantly from the lowest
    can still rank behind it, if it does from another one.
    """
    tested = {index for pair in found if pair.p is not None for index in (pair.one, pair.other)}
    worse = [(pair.other if pair.value < 0 else pair.one) for pair in found if pair.differs]
    return [1 + worse.count(index) if index in tested else None for index in range(count)]


def adjust_by_holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment, which controls the family-wise error rate."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for done, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - done) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def _mean(points: Sequence[Point]) -> float:
    return math.fsum(point.mir for point in points) / len(points)


def _mean_influences(points: Sequence[Point]) -> np.ndarray | None:
    known = [point.influences for point in points if point.influences is not None]
    if len(known) < len(points) or len({len(values) for values in known}) > 1:
        return None
    mean: np.ndarray = np.mean(known, axis=0)
    return mean


def _quantile(level: float, dof: float) -> float:
    """How many standard errors a difference needs to be significant, by Student's t."""
    from scipy.special import ndtri, stdtrit  # a tenth of the time that scipy.stats takes to import

    return -float(ndtri(level / 2) if math.isinf(dof) else stdtrit(dof, level / 2))


def _two_sided_p(value: float, se: float, dof: float) -> float:
    """Two-sided p-value by Student's t."""
    from scipy.special import ndtr, stdtr

    if se == 0:
        return 1.0 if value == 0 else 0.0
    t = abs(value) / se
    return float(2 * (ndtr(-t) if math.isinf(dof) else stdtr(dof, -t)))
