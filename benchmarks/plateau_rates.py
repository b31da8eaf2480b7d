# SPDX-License-Identifier: Apache-2.0
"""How often the plateau rule stops too early or too late, on curves whose truth is known.

    python benchmarks/plateau_rates.py > benchmarks/results/plateau.md

A stop is false if going on would at that point, or at any later one, bring `min_delta` (0.02) or more within a tenth
of the run. A curve is on its true plateau from where a tenth of the run never again brings half of that, 0.01. A stop
is in time if it is not false and comes at most 15 % of the run after the true plateau's beginning. Seeds are fixed.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from multiprocessing import Pool

import numpy as np
from plateau_curves import FALLING, PLANNED, SATURATING, Array, Curve, level, noise, second_fall, settled, straight_by
from plateau_runs import (
    RULE,
    SEED,
    SETTINGS,
    STANDARD,
    Outcome,
    Setting,
    draws,
    families,
    planned_outcomes,
    pooled,
    rate,
    records,
    stop_of,
    summary,
)

from mir_callback import PlateauRule, early_stopping

Spread = Callable[..., Iterable[list[Outcome]]]  # `map`, or that of a process pool
HEAD = ("false stops, falling", "false stops, saturating", "in time, saturating")
LASTING = SETTINGS[4]  # the standard one with autocorrelated noise


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n## {title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def all_families(runs: int, spread: Spread) -> None:
    """The default rule on every family, and as often as MIR is evaluated."""
    rows, totals = [], []
    kinds: dict[str, list[Outcome]] = {"all saturating": [], "all falling": []}
    for setting in SETTINGS:
        per = families(RULE, setting, runs, spread)
        for name, found in per.items():
            late = [o.stop - o.plateau for o in found if not o.false and o.stop < math.inf]
            timely = rate(sum(o.in_time for o in found), runs) if name in SATURATING else "-"
            delay = f"{100 * float(np.median(late)):+.0f} %" if name in SATURATING and late else "-"
            rows.append((str(setting), name, rate(sum(o.false for o in found), runs), timely, delay))
        saturating, falling = ([o for name in names for o in per[name]] for names in (SATURATING, FALLING))
        kinds["all saturating"] += saturating
        kinds["all falling"] += falling
        totals.append((str(setting), *summary(saturating, falling)))
    totals.append(("**all settings**", *summary(*kinds.values())))
    table("How often MIR is evaluated", ("setting", *HEAD), totals)
    table("Families", ("setting", "curve", "false stops", "in time", "median delay, of the run"), rows)


def schedules(runs: int, spread: Spread) -> None:
    """Few evaluations, and evaluations at uneven steps."""
    few = (Setting(20, 0.003), Setting(30, 0.003))
    uneven = [Setting(count, 0.003, 0, "log-spaced") for count in (20, 44, 100, 200, 400)]
    uneven += [Setting(count, 0.003, 0, "by a share of the time") for count in (44, 100, 400)]
    rows = [(str(setting), *summary(*pooled(RULE, setting, runs, spread))) for setting in (*few, *uneven)]
    table("Few evaluations, uneven steps", ("setting", *HEAD), rows)


def plans(runs: int, spread: Spread) -> None:
    """MIR falls again where the learning rate drops or an epoch begins."""
    jobs = [
        (name, setting, is_known)
        for name in PLANNED
        for setting in (STANDARD, SETTINGS[1], LASTING)
        for is_known in (True, False)
    ]
    rows = []
    for job, found in zip(jobs, spread(functools.partial(_planned, runs), jobs), strict=True):
        name, setting, is_known = job
        counts = sum(o.false for o in found), sum(o.in_time for o in found)
        rows.append((name, str(setting), "yes" if is_known else "no", *(rate(count, runs) for count in counts)))
    table("Planned changes", ("curve", "setting", "known to the rule", "false stops", "in time"), rows)


def _planned(runs: int, job: tuple[str, Setting, bool]) -> list[Outcome]:
    name, setting, is_known = job
    return planned_outcomes(RULE, name, setting, runs, is_known)


def variants(runs: int, spread: Spread) -> None:
    """Other rules, other noise, failed evaluations and outliers, all families pooled."""
    head = ("what differs", *HEAD)
    rules = {
        "default": RULE,
        "patience=2": PlateauRule(patience=2),
        "log_steps=True": PlateauRule(log_steps=True),
        "window=7": PlateauRule(window=7),
    }
    rows = [(name, *summary(*pooled(rule, STANDARD, runs, spread))) for name, rule in rules.items()]
    spoils = {"15 % of evaluations fail": {"failed": 0.15}, "5 % are off by 20 times the noise": {"spikes": 0.05}}
    rows += [(name, *summary(*pooled(RULE, STANDARD, runs, spread, **spoil))) for name, spoil in spoils.items()]
    robust, early_stopping.theil_sen_slope = early_stopping.theil_sen_slope, least_squares
    rows.append(("line by least squares", *summary(*pooled(RULE, STANDARD, runs))))
    rows.append(("the same, 5 % off", *summary(*pooled(RULE, STANDARD, runs, spikes=0.05))))
    early_stopping.theil_sen_slope = robust
    table(f"Variants ({STANDARD})", head, rows)
    noisier = (Setting(44, 0.006), Setting(44, 0.01), Setting(44, 0.02), Setting(400, 0.01), Setting(400, 0.02))
    rows = [(str(setting), *summary(*pooled(RULE, setting, runs, spread))) for setting in noisier]
    table("More noise", ("setting", *HEAD), rows)


def lingering(runs: int, spread: Spread) -> None:
    """Noise of several sizes that lingers more or less; steady falls that are worth going on for, under it."""
    rows = []
    for size in (0.003, 0.006, 0.01, 0.02):
        for memory in (0.0, 0.5, 0.8):
            setting = Setting(44, size, memory)
            falls = [rate(stopped_falls(factor, setting, 2 * runs), 2 * runs) for factor in (1.5, 2)]
            rows.append((f"{size}", f"{memory:.1f}", *summary(*pooled(RULE, setting, runs, spread)), *falls))
    head = ("noise", "autocorrelation", *HEAD)
    more = tuple(f"steady fall by {factor} min_delta is stopped" for factor in (1.5, 2))
    table("Autocorrelated noise (44 evaluations)", (*head, *more), rows)


def stopped_falls(factor: float, setting: Setting, runs: int) -> int:
    """How many of the runs are stopped that fall steadily by so many times `min_delta` in a tenth of the run."""
    t = np.arange(setting.evaluations + 1) / setting.evaluations
    curve, rng = straight_by(factor * RULE.min_delta), np.random.default_rng(SEED)
    made = [curve(t) + noise(rng, len(t), setting.size, setting.memory) for _ in range(runs)]
    return sum(stop_of(RULE, records(t, values)) < math.inf for values in made)


def least_squares(x: Array, y: Array) -> float:
    """The usual slope."""
    return float((x - x.mean()) @ y / ((x - x.mean()) ** 2).sum())


def drift(runs: int) -> None:
    """Steady falls around min_delta: how sharply the rule tells them apart."""
    rows = []
    for factor in (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2):
        shares = [rate(stopped_falls(factor, setting, runs), runs) for setting in (STANDARD, LASTING)]
        rows.append((f"{factor} times min_delta", *shares))
    head = ("a tenth of the run brings", str(STANDARD), str(LASTING))
    table("Steady falls: runs that are stopped at all", head, rows)


def shelves(runs: int) -> None:
    """A second fall behind a level stretch, which no rule can foresee."""
    t = np.arange(STANDARD.evaluations + 1) / STANDARD.evaluations
    rows = []
    for shelf in (0.05, 0.1, 0.15, 0.2, 0.3):
        rng, counts = np.random.default_rng(SEED), [0, 0]
        for _ in range(runs):
            curve = second_fall(rng, shelf)
            values = curve(t) + noise(rng, len(t), STANDARD.size, STANDARD.memory)
            for number, patience in enumerate((1, 4)):
                rule = PlateauRule(patience=patience)
                counts[number] += stop_of(rule, records(t, values)) < settled(curve, RULE.min_delta)
        rows.append((f"{shelf:.0%} of the run", *(rate(count, runs) for count in counts)))
    head = ("the first plateau lasts", "stopped on it, default", "with patience=4")
    table(f"A late second fall ({STANDARD})", head, rows)


def nothing_but_noise(runs: int) -> None:
    """A level curve: every verdict that it gets, until it is stopped."""
    rows = []
    for setting in (STANDARD, LASTING, Setting(44, 0.01), Setting(44, 0.02), Setting(44, 0.05)):
        t, rng = np.arange(setting.evaluations + 1) / setting.evaluations, np.random.default_rng(SEED)
        kinds: Counter[str] = Counter()
        stopped = 0
        for _ in range(runs):
            history = records(t, level(rng)(t) + noise(rng, len(t), setting.size, setting.memory))
            for verdict in islice(RULE.replay(history), RULE.min_evaluations - 1, None):
                kinds[verdict.kind] += 1
                if verdict.stop:
                    stopped += 1
                    break
        total = sum(kinds.values())
        shares = [f"{100 * kinds[kind] / total:.1f} %" for kind in ("going on", "too noisy", "rising")]
        rows.append((str(setting), rate(stopped, runs), *shares))
    head = ("setting", "stopped before the end", "going on", "too noisy", "rising")
    table("Nothing but noise: runs stopped, and the share of verdicts until then", head, rows)


def sampling(runs: int, samples: int = 100) -> None:
    """A probe of few samples: each has its own level, its own drift and its own noise. Truth is all samples there are.

    Levels spread so that `mir_se` is 0.02; drifts so that over a run the probe's curve departs by a standard deviation
    of ``drift`` from that of all samples.
    """
    names = ("left out", "paired influences")
    rows = []
    for drift_of_probe in (0.0, 0.02, 0.05, 0.1):
        in_time, early = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
        for family in SATURATING.values():
            for curve, false_before, plateau, rng in draws(family, False, runs, SEED):
                for name, stop in zip(names, _stops_of_probe(curve, rng, samples, drift_of_probe), strict=True):
                    in_time[name] += Outcome(stop, false_before, plateau).in_time
        rng, falls = np.random.default_rng(SEED), 4 * runs
        for _ in range(falls):
            stops = _stops_of_probe(straight_by(1.25 * RULE.min_delta), rng, samples, drift_of_probe)
            for name, stop in zip(names, stops, strict=True):
                early[name] += stop < math.inf
        for name in names:
            shares = rate(early[name], falls), rate(in_time[name], len(SATURATING) * runs)
            rows.append((f"{drift_of_probe}", name, *shares))
    head = ("drift of the probe", "the samples' error is", "stopped on a fall of 1.25 min_delta", "in time, saturating")
    table(f"What the standard error of MIR is good for ({STANDARD}, mir_se 0.02)", head, rows)


def _stops_of_probe(curve: Curve, rng: np.random.Generator, samples: int, drift: float) -> tuple[float, float]:
    """Where a run is stopped with the samples' error left out, and with paired influences."""
    t, root = np.arange(STANDARD.evaluations + 1) / STANDARD.evaluations, math.sqrt(samples)
    own = 0.02 * root * rng.standard_normal(samples) + drift * root * np.outer(t, rng.standard_normal(samples))
    own = own + 0.001 * root * rng.standard_normal(own.shape)  # (N, S)
    values = curve(t) + own.mean(axis=1) + noise(rng, len(t), STANDARD.size, 0)
    full = records(t, values, influences=(own - own.mean(axis=1, keepdims=True)).tolist())
    return stop_of(RULE, records(t, values)), stop_of(RULE, full)


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100, help="runs of each family and setting (default: 100)")
    runs = parser.parse_args().runs
    print("# Rates of the plateau rule\n")
    print(f"`{RULE!r}`; {runs} runs a row before pooling; intervals are 95 %. What the words mean: `docs/stopping.md`.")
    half = max(1, runs // 2)
    with Pool(2) as pool:
        all_families(runs, pool.map)
        schedules(half, pool.map)
        plans(runs, pool.map)
        variants(half, pool.map)
        lingering(half, pool.map)
    drift(runs)
    shelves(runs)
    nothing_but_noise(runs)
    sampling(max(1, runs // 5))


if __name__ == "__main__":
    main()
