# SPDX-License-Identifier: Apache-2.0
"""Figures of the evidence, as pure functions of the raw values in decisions.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

Array = NDArray[np.float64]
Run = dict[str, Any]

BOOTSTRAPS = 2000
HALVES = 400


@dataclass(frozen=True)
class Metric:
    """A metric of a finished stage 1: where it stands in a run, and whether lower is better."""

    title: str
    value: Callable[[dict[str, float]], float] = field(repr=False)
    lower: bool = True
    kept: bool = True  # whether the package has it
    one_number: bool = True


def _of(name: str) -> Callable[[dict[str, float]], float]:
    return lambda values: values[name]


METRICS = {
    "mir": Metric("MIR", _of("mir")),
    "captions_mir": Metric("MIR, captions as texts", _of("captions_mir")),
    "scale_free_mir": Metric("scale-free MIR", _of("scale_free_mir")),
    "captions_scale_free_mir": Metric("scale-free MIR, captions as texts", _of("captions_scale_free_mir")),
    "vision_gain": Metric("vision gain", _of("captions_vision_gain"), lower=False),
    "probe_loss": Metric("probe loss (captions of unseen scenes)", _of("captions_probe_loss")),
    "loss": Metric("last training loss", _of("loss")),
    "paper_fast": Metric("MIR, `paper_fast`", _of("paper_fast")),
    "mean_part": Metric("`mean_part`, mean over layers", _of("mean_part")),
    "norm_ratio": Metric("`norm_ratio`, distance from 1", lambda values: abs(math.log(values["norm_ratio"]))),
    "cosine": Metric("`cosine`, mean over layers", _of("cosine"), lower=False),
    "vision_rank": Metric("`vision_rank`, mean over layers", _of("vision_rank"), lower=False),
    "last_layer": Metric("distance of the last layer", _of("last_layer")),
    "unit_token_mir": Metric("MIR of unit-length tokens", _of("unit_token_mir"), kept=False),
    "unit_vision_rank": Metric("vision rank of unit-length tokens", _of("unit_vision_rank"), lower=False, kept=False),
    "null_calibrated": Metric("MIR over that of swapped labels", _of("null_calibrated"), kept=False),
    "neighbours_kept": Metric("neighbours kept by the projector", _of("neighbours_kept"), lower=False, kept=False),
    "neighbours_kept_last": Metric(
        "neighbours kept up to the last layer", _of("neighbours_kept_last"), lower=False, kept=False
    ),
    "modality_neighbours": Metric(
        "neighbours shared by images and captions", _of("modality_neighbours"), lower=False, kept=False
    ),
}


@dataclass(frozen=True)
class Table:
    """Values of runs, (recipes, seeds), of recipes that went through stage 2."""

    recipes: list[str]
    kinds: list[str]
    captions: list[str]  # recipes with the same have losses that compare
    accuracy: Array
    values: dict[str, Array]  # by metric, negated where higher is better


def tabulate(runs: Sequence[Run]) -> Table:
    """The scored recipes that have every seed."""
    scored = [run for run in runs if run["accuracy"] is not None]
    seeds = sorted({run["seed"] for run in scored})
    by_name: dict[str, dict[int, Run]] = {}
    for run in scored:
        by_name.setdefault(run["recipe"], {})[run["seed"]] = run
    complete = {name: found for name, found in by_name.items() if sorted(found) == seeds}
    rows = [[found[seed] for seed in seeds] for found in complete.values()]
    accuracy = np.array([[run["accuracy"] for run in row] for row in rows])
    values = {
        name: np.array([[(1 if metric.lower else -1) * metric.value(run["stage1"]) for run in row] for row in rows])
        for name, metric in METRICS.items()
    }
    first = [row[0] for row in rows]
    return Table(list(complete), [r["kind"] for r in first], [r["captions"] for r in first], accuracy, values)


def seed_std(values: Array) -> float:
    """Standard deviation between seeds of one recipe, pooled over recipes."""
    return math.sqrt(float(values.var(axis=1, ddof=1).mean()))


def decided_pairs(table: Table, chosen: Callable[[int, int], bool] = lambda one, other: True) -> list[tuple[int, int]]:
    """Pairs of recipes, better first, whose accuracies differ by more than two standard errors between seeds."""
    means = table.accuracy.mean(axis=1)
    least = 2 * seed_std(table.accuracy) * math.sqrt(2 / table.accuracy.shape[1])
    return [
        (one, other) if means[one] > means[other] else (other, one)
        for one, other in combinations(range(len(means)), 2)
        if abs(means[one] - means[other]) > least and chosen(one, other)
    ]


def share_right(values: Array, pairs: Sequence[tuple[int, int]], seeds: bool = False) -> float:
    """Share of pairs ordered as their accuracies are: by means over seeds, or by single runs that share their seed."""
    if not pairs:
        return math.nan
    better, worse = np.array(pairs).T
    shown = values if seeds else values.mean(axis=1, keepdims=True)
    differences = shown[worse] - shown[better]
    return float(np.mean((differences > 0) + 0.5 * (differences == 0)))


def interval(values: Array, pairs: Sequence[tuple[int, int]], count: int, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of `share_right` over recipes: a pair counts as often as both its recipes are drawn."""
    rng = np.random.default_rng(0)
    better, worse = np.array(pairs).T
    means = values.mean(axis=1)
    right = (means[worse] > means[better]).astype(float)
    draws = rng.multinomial(count, np.full(count, 1 / count), size=BOOTSTRAPS)
    weights = draws[:, better] * draws[:, worse]
    shares = (weights @ right) / np.maximum(weights.sum(axis=1), 1)
    low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def spearman(table: Table, name: str) -> float:
    """Rank correlation of a metric with accuracy, both means over seeds; 1 is perfect."""
    return float(-spearmanr(table.values[name].mean(axis=1), table.accuracy.mean(axis=1)).statistic)


@dataclass(frozen=True)
class Seeds:
    """What seeds do to a metric."""

    within: float  # standard deviation between seeds of one recipe
    between: float  # standard deviation between recipes' means
    shared: float  # correlation of runs of two recipes that share their seed, given the recipes
    paired_gain: float  # how much smaller pairing makes the error of a difference


def seeds_of(values: Array) -> Seeds:
    """From (recipes, seeds)."""
    residuals = values - values.mean(axis=1, keepdims=True)
    recipes, seeds = values.shape
    total = float((residuals**2).sum() / (recipes * (seeds - 1)))
    # Residuals about two means: the interaction's mean square is what pairing leaves.
    rest = residuals - residuals.mean(axis=0)
    left = float((rest**2).sum() / ((recipes - 1) * (seeds - 1)))
    return Seeds(math.sqrt(total), float(values.mean(axis=1).std(ddof=1)), 1 - left / total, math.sqrt(left / total))


def choose_on_halves(table: Table, names: Sequence[str], least_pairs: int = 10) -> dict[str, Any]:
    """Choose the best metric, or sum of two, on a random half of the recipes, and test it on the other half."""
    rng = np.random.default_rng(0)
    ranks = {name: _as_ranks(table.values[name].mean(axis=1)) for name in names}
    indices = {(name,): ranks[name] for name in names}
    indices |= {pair: ranks[pair[0]] + ranks[pair[1]] for pair in combinations(names, 2)}
    pairs, count = decided_pairs(table), len(table.recipes)
    better, worse = np.array(pairs).T
    right = {
        name: (index[worse] > index[better]) + 0.5 * (index[worse] == index[better]) for name, index in indices.items()
    }
    tested: dict[str, list[float]] = {"one": [], "two": [], **{name: [] for name in names}}
    picks: dict[tuple[str, ...], int] = {}
    for _ in range(HALVES):
        half = np.zeros(count, dtype=bool)
        half[rng.permutation(count)[: count // 2]] = True
        train, test = half[better] & half[worse], ~half[better] & ~half[worse]
        if min(train.sum(), test.sum()) < least_pairs:
            continue
        for title, size in (("one", 1), ("two", 2)):
            best = max((key for key in right if len(key) == size), key=lambda key: right[key][train].mean())
            picks[best] = picks.get(best, 0) + 1
            tested[title].append(float(right[best][test].mean()))
        for name in names:
            tested[name].append(float(right[(name,)][test].mean()))
    means = {name: float(np.mean(values)) for name, values in tested.items()}
    return {
        "means": means,
        "picks": {" + ".join(key): share for key, share in sorted(picks.items(), key=lambda i: -i[1])},
    }


def _as_ranks(values: Array) -> Array:
    order = np.argsort(np.argsort(values))
    return order.astype(float)
