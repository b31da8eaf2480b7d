# SPDX-License-Identifier: Apache-2.0
"""How often the plateau rule stops too early or too late, on curves whose truth is known.

    python benchmarks/plateau_rates.py > benchmarks/results/plateau.md

A stop is false if going on would at that point, or at any later one, bring `min_delta` (0.02) or more within a tenth
of the run. A curve is on its true plateau from where a tenth of the run never again brings half of that, 0.01. A stop
is in time if it is not false and comes at most 15 % of the run after the true plateau's beginning. Seeds are fixed.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from plateau_curves import FALLING, SATURATING, Array, Curve, level, noise, second_fall, settled, straight_by
from plateau_runs import (
    RULE,
    SEED,
    SETTINGS,
    STANDARD,
    Outcome,
    Setting,
    draws,
    outcomes,
    pooled,
    rate,
    records,
    stop_of,
    summary,
)

from mir_callback import PlateauRule, early_stopping
from mir_callback.record import EvalRecord


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n## {title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def families(runs: int) -> None:
    """The default rule on every family."""
    rows = []
    kinds: dict[str, list[Outcome]] = {"all saturating": [], "all falling": []}
    for setting in SETTINGS:
        per: dict[str, list[Outcome]] = {}
        for name, family in {**SATURATING, **FALLING}.items():
            per[name] = found = outcomes(RULE, family, name in FALLING, setting, runs)
            late = [o.stop - o.plateau for o in found if not o.false and o.stop < math.inf]
            timely = rate(sum(o.in_time for o in found), runs) if name in SATURATING else "-"
            delay = f"{100 * float(np.median(late)):+.0f} %" if name in SATURATING and late else "-"
            rows.append((str(setting), name, rate(sum(o.false for o in found), runs), timely, delay))
        for kind, names in (("all saturating", SATURATING), ("all falling", FALLING)):
            found = [o for name in names for o in per[name]]
            kinds[kind] += found
            timely = rate(sum(o.in_time for o in found), len(found)) if names is SATURATING else "-"
            rows.append((str(setting), f"**{kind}**", rate(sum(o.false for o in found), len(found)), timely, "-"))
    for kind, found in kinds.items():
        timely = rate(sum(o.in_time for o in found), len(found)) if kind == "all saturating" else "-"
        rows.append(("**all settings**", f"**{kind}**", rate(sum(o.false for o in found), len(found)), timely, "-"))
    table("Families", ("setting", "curve", "false stops", "in time", "median delay, of the run"), rows)


def variants(runs: int) -> None:
    """Other rules, other noise, failed evaluations and outliers, all families pooled."""
    head = ("what differs", "false stops, falling", "false stops, saturating", "in time, saturating")
    rules = {
        "default": RULE,
        "patience=2": PlateauRule(patience=2),
        "log_steps=True": PlateauRule(log_steps=True),
        "window=10": PlateauRule(window=10),
    }
    rows = [(name, *summary(*pooled(rule, STANDARD, runs))) for name, rule in rules.items()]
    spoils = {"15 % of evaluations fail": {"failed": 0.15}, "5 % are off by 20 times the noise": {"spikes": 0.05}}
    rows += [(name, *summary(*pooled(RULE, STANDARD, runs, **spoil))) for name, spoil in spoils.items()]
    robust, early_stopping.theil_sen_slope = early_stopping.theil_sen_slope, least_squares
    rows.append(("line by least squares", *summary(*pooled(RULE, STANDARD, runs))))
    rows.append(("the same, 5 % off", *summary(*pooled(RULE, STANDARD, runs, spikes=0.05))))
    early_stopping.theil_sen_slope = robust
    table(f"Variants ({STANDARD})", head, rows)
    noisier = (Setting(44, 0.006), Setting(44, 0.01), Setting(44, 0.02), Setting(100, 0.01), Setting(22, 0.003))
    rows = [(str(setting), *summary(*pooled(RULE, setting, runs))) for setting in noisier]
    table("More noise, fewer evaluations", ("setting", *head[1:]), rows)


def lingering(runs: int) -> None:
    """Noise of several sizes that lingers more or less; steady falls that are worth going on for, under it."""
    rows = []
    for size in (0.003, 0.006, 0.01, 0.02):
        for memory in (0.0, 0.5, 0.8):
            setting = Setting(44, size, memory)
            falls = [rate(stopped_falls(factor, setting, 2 * runs), 2 * runs) for factor in (1.5, 2)]
            rows.append((f"{size}", f"{memory:.1f}", *summary(*pooled(RULE, setting, runs)), *falls))
    head = ("noise", "autocorrelation", "false stops, falling", "false stops, saturating", "in time, saturating")
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
        shares = [rate(stopped_falls(factor, setting, runs), runs) for setting in (STANDARD, SETTINGS[2])]
        rows.append((f"{factor} times min_delta", *shares))
    head = ("a tenth of the run brings", str(STANDARD), str(SETTINGS[2]))
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
    for setting in (STANDARD, SETTINGS[2], Setting(44, 0.01), Setting(44, 0.02), Setting(44, 0.05)):
        t, rng = np.arange(setting.evaluations + 1) / setting.evaluations, np.random.default_rng(SEED)
        kinds: Counter[str] = Counter()
        stopped = 0
        for _ in range(runs):
            history = records(t, level(rng)(t) + noise(rng, len(t), setting.size, setting.memory))
            for count in range(RULE.warmup + RULE.window, len(history) + 1):
                verdict = RULE.verdict(history[:count])
                kinds[verdict.kind] += 1
                if verdict.stop:
                    stopped += 1
                    break
        total = sum(kinds.values())
        shares = [f"{100 * kinds[kind] / total:.1f} %" for kind in ("going on", "too noisy", "rising")]
        rows.append((str(setting), rate(stopped, runs), *shares))
    head = ("setting", "stopped before the end", "going on", "too noisy", "rising")
    table("Nothing but noise: runs stopped, and the share of verdicts until then", head, rows)


class WithSampleError(PlateauRule):
    """Takes `mir_se` for noise of each value, which it is not."""

    def _gain(self, points: Sequence[EvalRecord], x: Array, ahead: float, least: int) -> tuple[float, float, int]:
        gain, error, count = super()._gain(points, x, ahead, least)
        lent = float(np.mean([record.mir_se for record in points[-count:]]))
        return gain, math.hypot(error, lent / early_stopping.spread(x[-count:]) * ahead), count


def sampling(runs: int, samples: int = 100) -> None:
    """A probe of few samples: each has its own level, its own drift and its own noise. Truth is all samples there are.

    Levels spread so that `mir_se` is 0.02; drifts so that over a run the probe's curve departs by a standard deviation
    of ``drift`` from that of all samples.
    """
    names = ("left out", "paired influences", "mir_se as noise")
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


def _stops_of_probe(curve: Curve, rng: np.random.Generator, samples: int, drift: float) -> tuple[float, float, float]:
    """Where a run is stopped with the samples' error left out, with paired influences, and with `mir_se` as noise."""
    t, root = np.arange(STANDARD.evaluations + 1) / STANDARD.evaluations, math.sqrt(samples)
    own = 0.02 * root * rng.standard_normal(samples) + drift * root * np.outer(t, rng.standard_normal(samples))
    own = own + 0.001 * root * rng.standard_normal(own.shape)  # (N, S)
    values = curve(t) + own.mean(axis=1) + noise(rng, len(t), STANDARD.size, 0)
    bare = records(t, values, mir_se=(own.std(axis=1, ddof=1) / root).tolist())
    full = records(t, values, influences=(own - own.mean(axis=1, keepdims=True)).tolist())
    return stop_of(RULE, bare), stop_of(RULE, full), stop_of(WithSampleError(), bare)


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100, help="runs of each family and setting (default: 100)")
    runs = parser.parse_args().runs
    print("# Rates of the plateau rule\n")
    print(f"`{RULE!r}`; {runs} runs a row before pooling; intervals are 95 %. What the words mean: `docs/stopping.md`.")
    families(runs)
    variants(max(1, runs // 2))
    lingering(max(1, runs // 2))
    drift(runs)
    shelves(runs)
    nothing_but_noise(runs)
    sampling(max(1, runs // 5))


if __name__ == "__main__":
    main()
