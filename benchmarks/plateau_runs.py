# SPDX-License-Identifier: Apache-2.0
"""Runs of the plateau rule on curves whose truth is known. What the words mean: `plateau_rates.py`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from plateau_curves import FALLING, PLANNED, SATURATING, Array, Curve, Family, noise, settled

from mir_callback import PlateauRule
from mir_callback.record import EvalRecord

RULE = PlateauRule()
SEED = 20  # not one the rule was tuned with
MAX_STEPS = 2200  # of LLaVA's first stage
IN_TIME = 0.15
LATEST = 1 - 0.05 - IN_TIME  # a true plateau that begins later leaves no time to be found


@dataclass(frozen=True)
class Setting:
    """Evaluations in a run, the noise on them, and when they are made.

    ``memory`` is the noise's autocorrelation from one evaluation to the next, if there are 44: it belongs to the
    training, so that denser evaluations have more of it.
    """

    evaluations: int
    size: float
    memory: float = 0.0
    schedule: str = "evenly"

    def __str__(self) -> str:
        """In words."""
        lasting = f", autocorrelation {self.memory}" if self.memory else ""
        when = "" if self.schedule == "evenly" else f", {self.schedule}"
        return f"{self.evaluations} evaluations, noise {self.size}{lasting}{when}"

    def times(self, rng: np.random.Generator) -> Array:
        """Parts of the run at which evaluations are made, the first at 0, the last at 1."""
        even = np.arange(self.evaluations + 1) / self.evaluations
        if self.schedule == "log-spaced":
            return np.unique(np.round([0.0, *MAX_STEPS**even])) / MAX_STEPS
        if self.schedule == "by a share of the time":
            gaps = rng.uniform(0.5, 1.5, self.evaluations)
            return np.concatenate([[0.0], np.cumsum(gaps) / gaps.sum()])
        return even

    def noise(self, rng: np.random.Generator, count: int) -> Array:
        """(count,) noise of evaluations."""
        memory = self.memory ** (44 / self.evaluations) if self.memory else 0.0
        return noise(rng, count, self.size, memory)


SETTINGS = tuple(Setting(evaluations, 0.003, memory) for memory in (0.0, 0.5) for evaluations in (44, 100, 400, 2000))
STANDARD = SETTINGS[0]


@dataclass(frozen=True)
class Outcome:
    """One run: where it was stopped (inf: nowhere), and the truth."""

    stop: float
    false_before: float
    plateau: float

    @property
    def false(self) -> bool:
        """Stopped while it was worth going on."""
        return self.stop < self.false_before

    @property
    def in_time(self) -> bool:
        """Stopped neither too early nor too late."""
        return not self.false and self.stop <= self.plateau + IN_TIME


def records(t: Array, values: Array, max_steps: int = MAX_STEPS, **fields: Sequence[Any]) -> list[EvalRecord]:
    """The history of a run; NaN is an evaluation that failed."""
    made = []
    for number, (part, value) in enumerate(zip(t, values, strict=True)):
        more = {name: column[number] for name, column in fields.items()}
        mir = None if np.isnan(value) else float(value)
        made.append(EvalRecord(step=round(part * max_steps), mir=mir, max_steps=max_steps, **more))
    return made


def stop_of(rule: PlateauRule, history: Sequence[EvalRecord]) -> float:
    """Part of the run at which the rule ends it; inf if it doesn't."""
    for record, verdict in zip(history, rule.replay(history), strict=True):
        if verdict.stop:
            return record.step / (record.max_steps or MAX_STEPS)
    return math.inf


def draws(
    family: Family, falls: bool, runs: int, seed: int
) -> Iterator[tuple[Curve, float, float, np.random.Generator]]:
    """Curves of a family that fall to the end, or have a true plateau that can still be found."""
    rng = np.random.default_rng(seed)
    while runs:
        curve = family(rng)
        false_before, plateau = settled(curve, RULE.min_delta), settled(curve, RULE.min_delta / 2)
        if false_before > 0.95 if falls else plateau < LATEST:
            runs -= 1
            yield curve, false_before, plateau, rng


def outcomes(
    rule: PlateauRule, family: Family, falls: bool, setting: Setting, runs: int, **spoil: float
) -> list[Outcome]:
    """Many runs of a family."""
    found = []
    for curve, false_before, plateau, rng in draws(family, falls, runs, SEED):
        t = setting.times(rng)
        values = curve(t) + setting.noise(rng, len(t))
        values = spoiled(values, setting, rng, **spoil)
        found.append(Outcome(stop_of(rule, records(t, values)), false_before, plateau))
    return found


def planned_outcomes(rule: PlateauRule, name: str, setting: Setting, runs: int, is_known: bool = True) -> list[Outcome]:
    """Runs that fall again where the plan has a change, with or without the plan in the records."""
    family, changes, field = PLANNED[name]
    found = []
    for curve, false_before, plateau, rng in draws(family, False, runs, SEED):
        t = setting.times(rng)
        ahead = [
            next((round(at * MAX_STEPS) for at in changes if round(at * MAX_STEPS) >= round(part * MAX_STEPS)), None)
            for part in t
        ]
        history = records(t, curve(t) + setting.noise(rng, len(t)), **{field: ahead} if is_known else {})
        found.append(Outcome(stop_of(rule, history), false_before, plateau))
    return found


def spoiled(values: Array, setting: Setting, rng: np.random.Generator, failed: float = 0, spikes: float = 0) -> Array:
    """Some evaluations fail; some are off by twenty times the noise."""
    off = np.where(rng.random(len(values)) < spikes, 20 * setting.size, 0.0)
    return np.where(rng.random(len(values)) < failed, np.nan, values + off)


def rate(hits: int, runs: int) -> str:
    """A share in percent, with its 95 % interval (Wilson's)."""
    z, p = 1.96, hits / runs
    middle = (p + z**2 / (2 * runs)) / (1 + z**2 / runs)
    half = z / (1 + z**2 / runs) * math.sqrt(p * (1 - p) / runs + z**2 / (4 * runs**2))
    return f"{100 * p:.1f} % ({100 * max(0, middle - half):.1f} to {100 * min(1, middle + half):.1f})"


def pooled(
    rule: PlateauRule, setting: Setting, runs: int, spread: Callable[..., Iterable[list[Outcome]]] = map, **spoil: float
) -> tuple[list[Outcome], list[Outcome]]:
    """The outcomes of all saturating families, and of all falling ones; ``spread`` may be the map of a process pool."""
    per = families(rule, setting, runs, spread, **spoil)
    return [o for name in SATURATING for o in per[name]], [o for name in FALLING for o in per[name]]


def families(
    rule: PlateauRule, setting: Setting, runs: int, spread: Callable[..., Iterable[list[Outcome]]] = map, **spoil: float
) -> dict[str, list[Outcome]]:
    """The outcomes of each family."""
    every = {**SATURATING, **FALLING}
    falls = [name in FALLING for name in every]
    work = functools.partial(outcomes, rule, setting=setting, runs=runs, **spoil)
    return dict(
        zip(every, spread(functools.partial(_with, work), list(zip(every.values(), falls, strict=True))), strict=True)
    )


def _with(work: Callable[..., list[Outcome]], family_and_kind: tuple[Family, bool]) -> list[Outcome]:
    return work(*family_and_kind)


def summary(saturating: list[Outcome], falling: list[Outcome]) -> tuple[str, str, str]:
    """False stops on falling and on saturating curves, stops in time on saturating ones."""
    return (
        rate(sum(o.false for o in falling), len(falling)),
        rate(sum(o.false for o in saturating), len(saturating)),
        rate(sum(o.in_time for o in saturating), len(saturating)),
    )
