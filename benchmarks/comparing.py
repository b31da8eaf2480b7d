# SPDX-License-Identifier: Apache-2.0
"""How often `mir compare` says "no difference" of runs that differ in the seed only, and how often it finds a real one.

    python benchmarks/comparing.py --collect runs/seeds     # keep what benchmarks/seeds.py has trained
    python benchmarks/comparing.py > benchmarks/results/comparing.md

The first table is of real trainings, kept in benchmarks/results/seeds.json. Of each recipe's runs, two single ones are
compared, or two groups that share no run; at the end and at three points before it. The second has two single ones
beside another recipe's replicates. The third table is of simulated curves, whose noise between runs is known; the
fourth says how large a real difference has to be.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from mir_callback.analysis.compare import Recipe, compare
from mir_callback.analysis.curves import build_curves
from mir_callback.analysis.load import Run, read_run
from mir_callback.analysis.statistics import assume_std
from mir_callback.history import FILE_NAME
from mir_callback.record import EvalRecord

KEPT = Path(__file__).parent / "results" / "seeds.json"
MOST = 100  # comparisons of one kind
GROUPS = (1, 2, 3)
BESIDE = 20  # pairs of runs beside each other recipe
SHARES = (0.25, 0.5, 0.75, 1.0)
_HOW = {"probe_fingerprint": "p", "tokens_fingerprint": "t", "root": "exact"}


def run_of(name: str, steps: Sequence[int], values: Sequence[float]) -> Run:
    """A run with these values, all made in the same way."""
    records = tuple(EvalRecord(step=step, mir=float(mir), **_HOW) for step, mir in zip(steps, values, strict=True))
    return Run(name, Path(name), Path(name), records)


def collect(folder: Path) -> None:
    """Keep steps and values of all whole runs below a folder of `benchmarks/seeds.py`."""
    kept: dict[str, dict[str, object]] = {}
    for path in sorted(folder.glob(f"*/*/{FILE_NAME}")):
        if (path.parent / "trainer_state.json").exists():  # written last
            run = read_run(path)
            recipe = kept.setdefault(path.parents[1].name, {"steps": [r.step for r in run.measured], "mir": []})
            recipe["mir"].append([round(record.mir or 0.0, 4) for record in run.measured])  # type: ignore[attr-defined]
    KEPT.write_text(json.dumps(kept) + "\n")


def real_recipes() -> dict[str, list[Run]]:
    """The runs kept, by recipe."""
    return {
        name: [
            run_of(f"{name} {number}", found["steps"], values) for number, values in enumerate(found["mir"], start=1)
        ]
        for name, found in json.loads(KEPT.read_text()).items()
    }


def splits(runs: Sequence[Run], size: int, rng: np.random.Generator) -> Iterator[tuple[Recipe, Recipe]]:
    """Two groups of runs that share none: all ways if they are few, else as many as are wanted, drawn."""
    if size == 1:
        pairs = [((one,), (other,)) for one, other in combinations(range(len(runs)), 2)]
    else:
        drawn = [rng.permutation(len(runs))[: 2 * size] for _ in range(MOST)] if len(runs) >= 2 * size else []
        pairs = sorted({tuple(sorted((tuple(sorted(p[:size])), tuple(sorted(p[size:]))))) for p in drawn})
    for one, other in pairs:
        yield Recipe("one", tuple(runs[i] for i in one)), Recipe("other", tuple(runs[i] for i in other))


def differs(one: Recipe, other: Recipe, at: float | None = None) -> bool:
    """Whether the two are told apart."""
    result = compare([one, other], at=at).ranking
    assert result is not None
    return result.pairs[0].differs


def rate(found: Sequence[bool]) -> str:
    """How often there is no difference."""
    return f"{1 - np.mean(found):.0%} of {len(found)}" if found else "-"


def real_table() -> None:
    """Runs that differ in the seed only."""
    rng = np.random.default_rng(0)
    recipes = real_recipes()
    heads = [f"{size} against {size}" for size in GROUPS]
    print("| recipe | seeds | std between seeds | assumed of one run | " + " | ".join(heads) + " |")
    print("|---|---:|---:|---:|" + "---:|" * len(heads))
    total: dict[int, list[bool]] = {size: [] for size in GROUPS}
    for name, runs in recipes.items():
        ends = [run.measured[-1] for run in runs]
        assumed = [assume_std(c, c.x[-1]) for c in build_curves("step", runs) if c is not None]
        cells = []
        for size in GROUPS:
            found = [differs(*pair, at=share * ends[0].step) for pair in splits(runs, size, rng) for share in SHARES]
            total[size] += found
            cells.append(rate(found))
        spread = np.std([end.mir for end in ends], ddof=1)
        print(f"| {name} | {len(runs)} | {spread:.3f} | {np.mean(assumed):.3f} | " + " | ".join(cells) + " |")
    print("| all | | | | " + " | ".join(rate(total[size]) for size in GROUPS) + " |")


def beside_table() -> None:
    """Two runs that differ in the seed only, each a recipe of its own, beside another recipe that has replicates."""
    rng = np.random.default_rng(3)
    recipes = real_recipes()
    print("| two single runs of | " + " | ".join(f"beside {name}" for name in recipes) + " |")
    print("|---|" + "---:|" * len(recipes))
    every: list[bool] = []
    for name, runs in recipes.items():
        cells = []
        for other, replicates in recipes.items():
            if other == name:
                cells.append("-")
                continue
            pairs = list(combinations(runs, 2))
            chosen = [pairs[i] for i in rng.permutation(len(pairs))[:BESIDE]]
            found = []
            for one, two in chosen:
                alone = [Recipe("one", (one,)), Recipe("two", (two,))]
                result = compare([*alone, Recipe(other, tuple(replicates))]).ranking
                assert result is not None
                found += [pair.differs for pair in result.pairs if {pair.one, pair.other} == {0, 1}]
            every += found
            cells.append(rate(found))
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(f"\nAll: {rate(every)}.")


def simulated(rng: np.random.Generator, shape: str, std: float, count: int, lower: float = 0.0) -> list[Run]:
    """Runs of one recipe: its curve, a little faster or slower, a smooth departure of its own, and jitter.

    The departure has standard deviation ``std`` everywhere, and lasts for about a third of the run.
    """
    at = np.linspace(0, 1, 41)
    knots = np.linspace(0, 1, 81)
    spread = np.exp(-((knots[:, None] - knots[None, :]) ** 2) / (2 * 0.3**2)) + 1e-9 * np.eye(len(knots))
    root = np.linalg.cholesky(spread)
    runs = []
    for number in range(count):
        paced = at * np.exp(rng.normal(0, 0.05))
        curve = 3.0 + 1.5 * np.exp(-paced / 0.15)
        if shape == "rise and fall":
            curve = 2.6 + 1.2 * (paced / 0.1) * np.exp(1 - paced / 0.1) * (paced > 0)
        smooth = np.interp(at, knots, root @ rng.normal(0, std, len(knots)))
        runs.append(run_of(f"{shape} {number}", range(0, 410, 10), curve + smooth + rng.normal(0, 0.005, 41) - lower))
    return runs


def simulated_table() -> None:
    """Simulated runs that differ in the seed only, and such whose recipes differ."""
    rng = np.random.default_rng(1)
    print("| curve | std between seeds | " + " | ".join(f"{size} against {size}" for size in (1, 2, 3, 5)) + " |")
    print("|---|---:|---:|---:|---:|---:|")
    for shape in ("fall and saturate", "rise and fall"):
        for std in (0.01, 0.03, 0.1, 0.2):
            cells = []
            for size in (1, 2, 3, 5):
                found = []
                for _ in range(MOST):
                    runs = simulated(rng, shape, std, 2 * size)
                    found.append(differs(Recipe("one", tuple(runs[:size])), Recipe("other", tuple(runs[size:]))))
                cells.append(rate(found))
            print(f"| {shape} | {std} | " + " | ".join(cells) + " |")


def power_table() -> None:
    """How often a real difference is found."""
    rng = np.random.default_rng(2)
    print("| std between seeds | difference | " + " | ".join(f"{size} against {size}" for size in (1, 2, 3, 5)) + " |")
    print("|---:|---:|---:|---:|---:|---:|")
    for std, lower in ((0.01, 0.03), (0.01, 0.1), (0.03, 0.1), (0.03, 0.3), (0.1, 0.3), (0.1, 0.6)):
        cells = []
        for size in (1, 2, 3, 5):
            found = []
            for _ in range(MOST):
                one = simulated(rng, "fall and saturate", std, size)
                other = simulated(rng, "fall and saturate", std, size, lower)
                found.append(differs(Recipe("one", tuple(one)), Recipe("other", tuple(other))))
            cells.append(f"{np.mean(found):.0%}")
        print(f"| {std} | {lower} | " + " | ".join(cells) + " |")


def main() -> None:
    """Keep what was trained, or print the tables."""
    parser = argparse.ArgumentParser(description="How often is a difference found where only the seed differs?")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="keep the runs of benchmarks/seeds.py")
    options = parser.parse_args()
    if options.collect:
        collect(options.collect)
        return
    print("# `mir compare` where only the seed differs")
    print("\nMade by `python benchmarks/comparing.py`; docs/comparing.md explains.")
    print('\n## Real trainings: how often it says "no difference"\n')
    real_table()
    print('\n## Real trainings: how often it says "no difference" of two single runs beside a recipe with replicates\n')
    beside_table()
    print('\n## Simulated curves: how often it says "no difference"\n')
    simulated_table()
    print("\n## Simulated curves: how often a real difference is found\n")
    power_table()


if __name__ == "__main__":
    main()
