# SPDX-License-Identifier: Apache-2.0
"""Runs of the plateau rule on curves whose truth is known. What the words mean: `plateau_rates.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from plateau_curves import FALLING, SATURATING, Array, Curve, Family, noise, settled

from mir_callback import PlateauRule
from mir_callback.record import EvalRecord

RULE = PlateauRule()
SEED = 20  # not one the rule was tuned with
MAX_STEPS = 2200  # of LLaVA's first stage
IN_TIME = 0.15
LATEST = 1 - 0.05 - IN_TIME  # a true plateau that begins later leaves no time to be found


@dataclass(frozen=True)
class Setting:
    """Evaluations in a run, and the noise on them."""

    evaluations: int
    size: float
    memory: float = 0.0

    def __str__(self) -> str:
        """In words."""
        lasting = f", autocorrelation {self.memory}" if self.memory else ""
        return f"{self.evaluations} evaluations, noise {self.size}{lasting}"


SETTINGS = (
    Setting(44, 0.001),
    Setting(44, 0.003),
    Setting(44, 0.003, 0.5),
    Setting(100, 0.004),
    Setting(100, 0.003, 0.5),
)
STANDARD = SETTINGS[1]


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
    for count in range(1, len(history) + 1):
        if rule.verdict(history[:count]).stop:
            return history[count - 1].step / (history[count - 1].max_steps or MAX_STEPS)
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
    t = np.arange(setting.evaluations + 1) / setting.evaluations
    found = []
    for curve, false_before, plateau, rng in draws(family, falls, runs, SEED):
        values = curve(t) + noise(rng, len(t), setting.size, setting.memory)
        values = spoiled(values, setting, rng, **spoil)
        found.append(Outcome(stop_of(rule, records(t, values)), false_before, plateau))
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


def pooled(rule: PlateauRule, setting: Setting, runs: int, **spoil: float) -> tuple[list[Outcome], list[Outcome]]:
    """The outcomes of all saturating families, and of all falling ones."""
    return (
        [o for family in SATURATING.values() for o in outcomes(rule, family, False, setting, runs, **spoil)],
        [o for family in FALLING.values() for o in outcomes(rule, family, True, setting, runs, **spoil)],
    )


def summary(saturating: list[Outcome], falling: list[Outcome]) -> tuple[str, str, str]:
    """False stops on falling and on saturating curves, stops in time on saturating ones."""
    return (
        rate(sum(o.false for o in falling), len(falling)),
        rate(sum(o.false for o in saturating), len(saturating)),
        rate(sum(o.in_time for o in saturating), len(saturating)),
    )
