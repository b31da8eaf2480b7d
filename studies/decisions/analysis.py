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
from scipy.stats import rankdata, spearmanr

from studies.decisions.recipes import STOP_SEEDS

Array = NDArray[np.float64]
Run = dict[str, Any]
Pairs = list[tuple[int, int]]  # of recipes by index, the better one first

BOOTSTRAPS = 2000
HALVES = 400


@dataclass(frozen=True)
class Metric:
    """A metric of a finished stage 1: where it stands in a run, and whether lower is better."""

    title: str
    value: Callable[[dict[str, float]], float] = field(repr=False)
    lower: bool = True
    kept: bool = True  # whether the package has it


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
    incomplete: list[str]  # recipes left out, as a seed is missing
    accuracy: Array
    values: dict[str, Array]  # by metric, negated where higher is better


def tabulate(runs: Sequence[Run]) -> Table:
    """The scored recipes that have every seed; ValueError if there are none, or only one seed."""
    scored = [run for run in runs if run["accuracy"] is not None]
    seeds = sorted({run["seed"] for run in scored})
    by_name: dict[str, dict[int, Run]] = {}
    for run in scored:
        by_name.setdefault(run["recipe"], {})[run["seed"]] = run
    complete = {name: found for name, found in by_name.items() if sorted(found) == seeds}
    if len(seeds) < 2 or not complete:
        raise ValueError(
            f"No figures from {len(scored)} scored runs: no recipe has two seeds or more. Finish the study: make study"
        )
    rows = [[found[seed] for seed in seeds] for found in complete.values()]
    accuracy = np.array([[run["accuracy"] for run in row] for row in rows])
    values = {
        name: np.array([[(1 if metric.lower else -1) * metric.value(run["stage1"]) for run in row] for row in rows])
        for name, metric in METRICS.items()
    }
    incomplete = [name for name in by_name if name not in complete]
    return Table(list(complete), [row[0]["kind"] for row in rows], incomplete, accuracy, values)


def seed_std(values: Array) -> float:
    """Standard deviation between seeds of one recipe, the median over recipes."""
    return math.sqrt(float(np.median(values.var(axis=1, ddof=1))))


def decided_pairs(table: Table, chosen: Callable[[Table, int, int], bool]) -> Pairs:
    """Pairs of recipes, better first, whose accuracies differ by more than two standard errors between seeds.

    An error is that of the recipe's own seeds, but at least the median one, as three seeds may agree by chance.
    """
    means, variances = table.accuracy.mean(axis=1), table.accuracy.var(axis=1, ddof=1) / table.accuracy.shape[1]
    variances = np.maximum(variances, np.median(variances))
    return [
        (one, other) if means[one] > means[other] else (other, one)
        for one, other in combinations(range(len(means)), 2)
        if abs(means[one] - means[other]) > 2 * math.sqrt(variances[one] + variances[other])
        and chosen(table, one, other)
    ]


def share_right(values: Array, pairs: Pairs, single: bool = False) -> float:
    """Share of pairs that a metric orders as their accuracies are; a tie counts half.

    By means over seeds, or with ``single`` by one run of each recipe, the two with the same seed.
    """
    return float(_right(values if single else values.mean(axis=1, keepdims=True), pairs).mean())


def interval(values: Array, pairs: Pairs, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of :func:`share_right`; a pair counts as often as both of its recipes are drawn."""
    recipes = len(values)
    better, worse = np.array(pairs).T
    draws = np.random.default_rng(0).multinomial(recipes, np.full(recipes, 1 / recipes), size=BOOTSTRAPS)
    weights = draws[:, better] * draws[:, worse]
    shares = weights @ _right(values.mean(axis=1, keepdims=True), pairs)[:, 0] / np.maximum(weights.sum(axis=1), 1)
    low, high = np.quantile(shares, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _right(values: Array, pairs: Pairs) -> Array:
    """For each pair and column 1 if the first has the lower value, 0.5 for a tie, else 0."""
    better, worse = np.array(pairs).T
    right: Array = 0.5 * (1 + np.sign(values[worse] - values[better]))
    return right


def spearman(table: Table, name: str) -> float:
    """Rank correlation of a metric with accuracy, both means over seeds; 1 is perfect."""
    return float(-spearmanr(table.values[name].mean(axis=1), table.accuracy.mean(axis=1)).statistic)


@dataclass(frozen=True)
class Seeds:
    """What seeds do to a metric."""

    within: float  # standard deviation between seeds of one recipe
    between: float  # standard deviation between recipes' means
    shared: float  # correlation of runs of two recipes with the same seed, given their recipes
    paired: float  # standard deviation of the difference of two recipes' runs with the same seed


def seeds_of(values: Array) -> Seeds:
    """From (recipes, seeds), by a two-way analysis of variance."""
    recipes, seeds = values.shape
    residuals = values - values.mean(axis=1, keepdims=True)
    total = float((residuals**2).sum() / (recipes * (seeds - 1)))
    left = float(((residuals - residuals.mean(axis=0)) ** 2).sum() / ((recipes - 1) * (seeds - 1)))
    return Seeds(math.sqrt(total), float(values.mean(axis=1).std(ddof=1)), 1 - left / total, math.sqrt(2 * left))


@dataclass(frozen=True)
class Choice:
    """Shares of right decisions on recipes that the choice has not seen."""

    one: float  # of the best metric
    two: float  # of the best sum of two metrics' ranks
    of: dict[str, float]  # of each metric without a choice
    picks: dict[str, float]  # how often each was the best one
    pairs: dict[tuple[str, ...], float]  # and each sum


def is_honest(table: Table, one: int, other: int) -> bool:
    """Whether neither of two recipes is sabotaged."""
    return "sabotage" not in (table.kinds[one], table.kinds[other])


def choose_on_halves(table: Table, names: Sequence[str]) -> Choice:
    """Choose the best metric, or sum of two, on a random half of the recipes, and test it on the other half."""
    rng, count = np.random.default_rng(0), len(table.recipes)
    pairs = decided_pairs(table, is_honest)
    better, worse = np.array(pairs).T
    ranks = {name: rankdata(table.values[name].mean(axis=1)) for name in names}
    single = {(name,): _right(ranks[name][:, None], pairs)[:, 0] for name in names}
    double = {pair: _right((ranks[pair[0]] + ranks[pair[1]])[:, None], pairs)[:, 0] for pair in combinations(names, 2)}
    tested: dict[str, list[float]] = {name: [] for name in ("one", "two", *names)}
    picked: list[tuple[str, ...]] = []
    for _ in range(HALVES):
        half = np.zeros(count, dtype=bool)
        half[rng.permutation(count)[: count // 2]] = True
        seen, unseen = half[better] & half[worse], ~half[better] & ~half[worse]
        for title, candidates in (("one", single), ("two", double)):
            best = max(candidates, key=lambda key: float(candidates[key][seen].mean()))
            tested[title].append(float(candidates[best][unseen].mean()))
            picked.append(best)
        for name in names:
            tested[name].append(float(single[name,][unseen].mean()))
    means = {name: float(np.mean(values)) for name, values in tested.items()}
    often = {key: picked.count(key) / HALVES for key in sorted(set(picked), key=lambda key: (-picked.count(key), key))}
    picks = {key[0]: share for key, share in often.items() if len(key) == 1}
    pairs_often = {key: share for key, share in often.items() if len(key) == 2}
    return Choice(means.pop("one"), means.pop("two"), means, picks, pairs_often)


@dataclass(frozen=True)
class Stops:
    """Stage 2 from where the stop rule ends a run, against stage 2 from its end."""

    runs: int
    stopped: int  # of them, before their end
    cost: float  # mean accuracy lost in these; negative if gained
    interval: tuple[float, float]  # of it, 95 %, over recipes
    worst: float  # the most that a recipe lost, mean over its seeds
    worst_recipe: str
    saved: float  # mean share of the steps saved, over all runs
    median_saved: float  # the median of those that stopped
    most_saved: float
    fixed_cost: float  # the same from three quarters of the steps, where that was tried
    fixed_interval: tuple[float, float]


def stops_of(runs: Sequence[Run]) -> Stops:
    """Of all scored runs that are not sabotaged and were judged."""
    scored = [run for run in runs if run["accuracy"] is not None and run["seed"] in STOP_SEEDS]
    honest = [run for run in scored if run["kind"] != "sabotage"]
    stopped = [run for run in honest if run["stopped_accuracy"] is not None]
    lost = _losses(stopped, "stopped_accuracy")
    cost, interval = _mean_loss(lost)
    fixed_cost, fixed_interval = _mean_loss(
        _losses([run for run in honest if run["fixed_accuracy"] is not None], "fixed_accuracy")
    )
    saved = [1 - run["stopped_at"] / run["steps"] for run in stopped]
    worst = max(lost, key=lambda name: float(np.mean(lost[name])))
    return Stops(
        runs=len(honest),
        stopped=len(stopped),
        cost=cost,
        interval=interval,
        worst=float(np.mean(lost[worst])),
        worst_recipe=worst,
        saved=float(np.sum(saved)) / len(honest),
        median_saved=float(np.median(saved)),
        most_saved=max(saved),
        fixed_cost=fixed_cost,
        fixed_interval=fixed_interval,
    )


def _losses(runs: Sequence[Run], earlier: str) -> dict[str, list[float]]:
    """By recipe, the accuracy that each run loses by going into stage 2 earlier."""
    lost: dict[str, list[float]] = {}
    for run in runs:
        lost.setdefault(run["recipe"], []).append(run["accuracy"] - run[earlier])
    return lost


def _mean_loss(lost: dict[str, list[float]]) -> tuple[float, tuple[float, float]]:
    """Mean over runs, and its bootstrap interval of 95 % over recipes."""
    sums, counts = (np.array([kind(each) for each in lost.values()], dtype=float) for kind in (sum, len))
    draws = np.random.default_rng(0).multinomial(len(lost), np.full(len(lost), 1 / len(lost)), size=BOOTSTRAPS)
    low, high = np.quantile((draws @ sums) / (draws @ counts), [0.025, 0.975])
    return float(sums.sum() / counts.sum()), (float(low), float(high))
