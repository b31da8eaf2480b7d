# SPDX-License-Identifier: Apache-2.0
"""How often `mir compare` finds a difference where only the seed differs, and how large a real one has to be.

    python benchmarks/comparing.py --collect runs/seeds     # keep what benchmarks/seeds.py has trained
    python benchmarks/comparing.py > benchmarks/results/comparing.md

The first two tables are of real trainings, kept in benchmarks/results/seeds.json: groups of runs of one recipe that
share no run, at the end and at three points before it; and two recipes at the end, paired by seed or not. False alarms
of pairs are those of their differences less the mean, with random signs. The third table says why degrees of freedom
are counted as they are, the others which difference is found with so many seeds.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy import optimize, stats

from mir_callback.analysis.compare import Recipe, compare
from mir_callback.analysis.curves import Point
from mir_callback.analysis.load import Run, read_run
from mir_callback.analysis.statistics import Difference, find_differences
from mir_callback.early_stopping import PlateauRule
from mir_callback.history import FILE_NAME
from mir_callback.record import EvalRecord

KEPT = Path(__file__).parent / "results" / "seeds.json"
LEVEL, POWER = 0.05, 0.8
MOST = 100  # comparisons of one kind
DRAWS = 100_000  # of simulated values
SHARES = (0.25, 0.5, 0.75, 1.0)
COUNTS, CORRELATIONS = (2, 3, 5), (0.0, 0.5, 0.9)
_HOW = {"probe_fingerprint": "p", "tokens_fingerprint": "t", "root": "exact"}
_NEVER = PlateauRule(warmup=10**6)  # where a run could have stopped does not matter here


def run_of(name: str, steps: Sequence[int], values: Sequence[float], seed: int | None = None) -> Run:
    """A run with these values, all made in the same way."""
    pairs = zip(steps, values, strict=True)
    records = tuple(EvalRecord(step=step, mir=float(mir), seed=seed, **_HOW) for step, mir in pairs)
    return Run(name, Path(name), Path(name), records)


def collect(folder: Path) -> None:
    """Keep seeds, steps and values of all whole runs below a folder of `benchmarks/seeds.py`."""
    kept: dict[str, dict[str, list[object]]] = {}
    for path in sorted(folder.glob(f"*/*/{FILE_NAME}")):
        if (path.parent / "trainer_state.json").exists():  # written last
            run = read_run(path)
            recipe = kept.setdefault(
                path.parents[1].name, {"steps": [r.step for r in run.measured], "seeds": [], "mir": []}
            )
            recipe["seeds"].append(int(path.parent.name.removeprefix("seed_")))
            recipe["mir"].append([round(record.mir or 0.0, 4) for record in run.measured])
    KEPT.write_text(json.dumps(kept) + "\n")


def real_recipes(with_seeds: bool) -> dict[str, Recipe]:
    """The runs kept, by recipe; without seeds they are not paired."""
    recipes = {}
    for name, kept in json.loads(KEPT.read_text()).items():
        seeds = kept["seeds"] if with_seeds else [None] * len(kept["seeds"])
        runs = [run_of(f"{name} {n}", kept["steps"], mir, seeds[n]) for n, mir in enumerate(kept["mir"])]
        recipes[name] = Recipe(name, tuple(runs))
    return recipes


def values_of(recipe: Recipe, share: float = 1.0) -> np.ndarray:
    """The MIR of each run, after this share of its evaluations."""
    return np.array([run.records[round(share * (len(run.records) - 1))].mir for run in recipe.runs])


def splits(runs: Sequence[Run], size: int, rng: np.random.Generator) -> Iterator[list[Recipe]]:
    """Two groups of runs that share none, drawn; none if the runs are too few."""
    drawn = [rng.permutation(len(runs))[: 2 * size] for _ in range(MOST)] if len(runs) >= 2 * size else []
    for groups in sorted({tuple(sorted((tuple(sorted(p[:size])), tuple(sorted(p[size:]))))) for p in drawn}):
        yield [
            Recipe(name, tuple(runs[i] for i in group)) for name, group in zip(("one", "other"), groups, strict=True)
        ]


def difference(recipes: Sequence[Recipe], at: float | None) -> Difference:
    """What `mir compare` finds between two."""
    result = compare(recipes, at=at, rule=_NEVER).ranking
    assert result is not None
    return result.pairs[0]


def difference_of(one: Sequence[float], other: Sequence[float], paired: bool) -> Difference:
    """The same of bare values, one of each run."""
    points = [[Point(mir, None, None, True, 0) for mir in values] for values in (one, other)]
    seeds = [(number, None) if paired else None for number in range(len(one))]
    return find_differences(points, [seeds, seeds], LEVEL, [[True] * 2] * 2)[0]


def rate(found: Sequence[bool]) -> str:
    """How often there is a difference."""
    return f"{np.mean(found):.1%} of {len(found)}" if found else "-"


def real_table() -> None:
    """Runs that differ in the seed only."""
    rng = np.random.default_rng(0)
    total: dict[int, list[bool]] = {2: [], 3: []}
    print("| recipe | seeds | SD between seeds | " + " | ".join(f"{size} against {size}" for size in total) + " |")
    print("|---|---:|---:|---:|---:|")
    for name, recipe in real_recipes(with_seeds=False).items():
        last = recipe.runs[0].records[-1].step
        cells = []
        for size, every in total.items():
            pairs = list(splits(recipe.runs, size, rng))
            found = [difference(pair, share * last).differs for pair in pairs for share in SHARES]
            every += found
            cells.append(rate(found))
        print(f"| {name} | {len(recipe.runs)} | {values_of(recipe).std(ddof=1):.3f} | " + " | ".join(cells) + " |")
    print("| all | | | " + " | ".join(map(rate, total.values())) + " |")


def pairing_table() -> None:
    """Two recipes that share seeds, paired by them or not, and what pairing finds where signs are drawn."""
    rng = np.random.default_rng(3)
    total: dict[int, list[bool]] = {2: [], 3: []}
    heads = ["recipes", "seeds", "difference", "SD of either", "correlation", "SD of paired differences"]
    heads += ["p unpaired", "p paired", *(f"false alarms, {size} pairs" for size in total)]
    print("| " + " | ".join(heads) + " |")
    print("|---|" + "---:|" * (len(heads) - 1))
    blind = real_recipes(with_seeds=False)
    for one, other in combinations(real_recipes(with_seeds=True).values(), 2):
        if one.name.startswith("random") != other.name.startswith("random"):
            continue  # another model
        count = min(len(one.runs), len(other.runs))
        pair = [Recipe(each.name, each.runs[:count]) for each in (one, other)]
        apart = [Recipe(each.name, blind[each.name].runs[:count]) for each in (one, other)]
        found, left, right = difference(pair, None), *map(values_of, pair)
        cells = [f"{one.name} - {other.name}", f"{len(found.shared)}", f"{found.value:+.3f}"]
        cells += [f"{left.std(ddof=1):.3f}, {right.std(ddof=1):.3f}", f"{np.corrcoef(left, right)[0, 1]:.2f}"]
        cells += [f"{(left - right).std(ddof=1):.3f}", f"{difference(apart, None).p:.4f}", f"{found.p:.4f}"]
        for size, every in total.items():
            alarms = list(false_alarms(pair, size, rng))
            every += alarms
            cells.append(rate(alarms))
        print("| " + " | ".join(cells) + " |")
    print("| all |" + " |" * 7 + " " + " | ".join(map(rate, total.values())) + " |")


def false_alarms(pair: Sequence[Recipe], size: int, rng: np.random.Generator) -> Iterator[bool]:
    """Whether some pairs of runs differ, once their mean difference is taken away and signs are drawn."""
    for share in SHARES:
        one, other = (values_of(recipe, share) for recipe in pair)
        away = one - other - np.mean(one - other)
        for _ in range(MOST):
            drawn = rng.permutation(len(away))[:size]
            yield difference_of(away[drawn] * rng.choice([-1, 1], size), np.zeros(size), paired=True).differs


def rules_table() -> None:
    """False alarms of ways to count degrees of freedom, where values are normal."""
    rng = np.random.default_rng(1)
    print("| runs | SD of the other recipe | Welch-Satterthwaite | smaller recipe's | pooled over 6 recipes |")
    print("|---|---:|---:|---:|---:|")
    for count, many in ((2, 2), (2, 5), (3, 3), (3, 5), (5, 5)):
        for ratio in (1, 3, 10):
            one, other = rng.normal(0, ratio, (DRAWS, count)), rng.normal(0, 1, (DRAWS, many))
            parts = [one.var(1, ddof=1) / count, other.var(1, ddof=1) / many]
            t = (one.mean(1) - other.mean(1)) / np.sqrt(sum(parts))
            welch = sum(parts) ** 2 / (parts[0] ** 2 / (count - 1) + parts[1] ** 2 / (many - 1))
            rest = (many - 1) * other.var(1, ddof=1) + rng.chisquare(4 * (many - 1), DRAWS)
            dof = count - 1 + 5 * (many - 1)
            pooled = ((count - 1) * one.var(1, ddof=1) + rest) / dof
            pooled_t = (one.mean(1) - other.mean(1)) / np.sqrt(pooled * (1 / count + 1 / many))
            found = [(t, welch), (t, min(count, many) - 1), (pooled_t, dof)]
            cells = [f"{np.mean(2 * stats.t.sf(abs(value), each) < LEVEL):.1%}" for value, each in found]
            print(f"| {count} against {many} | {'equal' if ratio == 1 else f'1/{ratio}'} | " + " | ".join(cells) + " |")


def needed(count: int, correlation: float | None) -> float:
    """The difference, in SDs between seeds, that is found with probability POWER; correlation None: not paired."""
    se = math.sqrt(2 * (1 - (correlation or 0)) / count)
    dof = 2 * (count - 1) if correlation is None else count - 1  # of the estimate, for equal SDs
    draws = np.sqrt(stats.chi2.ppf((np.arange(4000) + 0.5) / 4000, dof) / dof)
    limits = draws * stats.t.isf(LEVEL / 2, count - 1)

    def lacks(difference: float) -> float:
        missed = stats.norm.cdf(limits - difference / se) - stats.norm.cdf(-limits - difference / se)
        return float(np.mean(missed)) - (1 - POWER)

    return float(optimize.brentq(lacks, 0, 100))


def power_tables() -> None:
    """The difference that is found, in units of the SD between seeds, and for those of real recipes."""
    heads = ["not paired", *(f"paired, correlation {rho:g}" for rho in CORRELATIONS)]
    kinds = [None, *CORRELATIONS]
    print("| seeds of each recipe | " + " | ".join(heads) + " |")
    print("|---:|" + "---:|" * len(heads))
    for count in COUNTS:
        print(f"| {count} | " + " | ".join(f"{needed(count, kind):.1f} s" for kind in kinds) + " |")
    rates = [found_share(count, kind, needed(count, kind)) for count in COUNTS for kind in kinds]
    print(f"\n`mir compare` finds them in {min(rates):.0%} to {max(rates):.0%} of 2000 simulated comparisons each.")
    print("\n## The same for the recipes above\n")
    cells = [f"{count} seeds{', paired' if rho is not None else ''}" for count in COUNTS for rho in (None, 0.9)]
    print("| recipe | SD between seeds | " + " | ".join(cells) + " |")
    print("|---|---:|" + "---:|" * len(cells))
    for name, recipe in real_recipes(with_seeds=False).items():
        std = values_of(recipe).std(ddof=1)
        found = [f"{std * needed(count, rho):.2f}" for count in COUNTS for rho in (None, 0.9)]
        print(f"| {name} | {std:.3f} | " + " | ".join(found) + " |")


def found_share(count: int, correlation: float | None, size: float) -> float:
    """How often `mir compare` finds a difference of this size between normal values of SD 1."""
    rng = np.random.default_rng(2)
    common, own = math.sqrt(correlation or 0), math.sqrt(1 - (correlation or 0))
    found = []
    for _ in range(2000):
        one, other = common * rng.normal(size=count) + own * rng.normal(size=(2, count))
        found.append(difference_of(one, other + size, paired=correlation is not None).differs)
    return float(np.mean(found))


def main() -> None:
    """Keep what was trained, or print the tables."""
    parser = argparse.ArgumentParser(description="How often is a difference found where only the seed differs?")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="keep the runs of benchmarks/seeds.py")
    options = parser.parse_args()
    if options.collect:
        collect(options.collect)
        return
    print("# `mir compare` and the noise between seeds")
    print("\nMade by `python benchmarks/comparing.py`; docs/comparing.md explains.")
    print("\n## Real trainings that differ in the seed only: how often it finds a difference\n")
    real_table()
    print("\n## Real recipes with the same seeds: paired or not\n")
    pairing_table()
    print("\n## Normal values of one mean: false alarms at level 0.05 by the degrees of freedom\n")
    rules_table()
    print("\n## Which difference is found with 80 % probability, with a standard deviation s between seeds\n")
    power_tables()


if __name__ == "__main__":
    main()
