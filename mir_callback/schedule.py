# SPDX-License-Identifier: Apache-2.0
"""When an evaluation is due: schedules over optimizer steps, and the events besides them. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from mir_callback.errors import ConfigError
from mir_callback.record import EvalRecord

_EPSILON = 1e-9  # an epoch is a sum of fractions
_FORMS = "50 (steps), 0.1ep (epochs), log5 (per decade), 5% (of the time) or 10,100,1000 (these steps)"


@dataclass(frozen=True)
class Pace:
    """How fast training and evaluations are, by rank 0's clock; the same on every rank. Sums go over restarts."""

    step: int = 0  # at which the clock was read
    evaluated_at: int | None = None  # the step of the last evaluation, None before the first
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    eval_cost: float | None = None  # seconds of the last evaluation, None before the first
    step_seconds: float | None = None  # of a training step since the last evaluation, None before the first step

    def to_fields(self) -> dict[str, Any]:
        """What a record keeps of it."""
        names = ("train_seconds", "eval_seconds", "eval_cost", "step_seconds")
        return {name: getattr(self, name) for name in names}

    @property
    def time_share(self) -> float:
        """The part of the time so far that evaluations took."""
        total = self.train_seconds + self.eval_seconds
        return self.eval_seconds / total if total > 0 else 0.0


@dataclass(frozen=True)
class TrainingProgress:
    """Where training stands; the same on every rank.

    Attributes:
        step: optimizer steps done.
        epoch: epochs done, with fraction.
        pace: the times that ranks have shared last.
    """

    step: int
    epoch: float = 0.0
    pace: Pace = field(default_factory=Pace)


@runtime_checkable
class Schedule(Protocol):
    """Anything that says when to evaluate. Must be pure, and the same on every rank."""

    def is_due(self, now: TrainingProgress, before: TrainingProgress) -> bool:
        """Whether to evaluate now, ``before`` being one step earlier (or equal, before the first step)."""
        ...


@dataclass(frozen=True)
class EverySteps:
    """Every ``steps`` optimizer steps; `every=50` is short for `every=EverySteps(50)`."""

    steps: int

    def __post_init__(self) -> None:
        """Check the number."""
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ConfigError(
                f"every must be an integer of at least 1 optimizer step, got {self.steps!r}; use e.g. every=50, or a "
                "schedule such as EveryEpochs(0.1)"
            )

    def is_due(self, now: TrainingProgress, before: TrainingProgress) -> bool:
        """Pure; see :class:`Schedule`."""
        return now.step > 0 and now.step % self.steps == 0


@dataclass(frozen=True)
class EveryEpochs:
    """Every ``epochs`` epochs, at the first step that reaches each multiple: EveryEpochs(0.1) ten times an epoch."""

    epochs: float

    def __post_init__(self) -> None:
        """Check the number."""
        _check_positive("EveryEpochs", self.epochs, "epochs", "0.1")

    def is_due(self, now: TrainingProgress, before: TrainingProgress) -> bool:
        """Pure; see :class:`Schedule`."""
        return self._multiples(now) > self._multiples(before)

    def _multiples(self, moment: TrainingProgress) -> int:
        return math.floor(moment.epoch / self.epochs + _EPSILON)


@dataclass(frozen=True)
class AtSteps:
    """At these optimizer steps: AtSteps((10, 100, 1000)); with none of them, at events only."""

    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        """Check the steps and bring them into order."""
        given: Any = self.steps
        if isinstance(given, str) or not isinstance(given, Collection) or any(type(step) is not int for step in given):
            raise ConfigError(f"AtSteps must get whole optimizer steps, got {given!r}; use e.g. AtSteps((10, 100))")
        if any(step < 0 for step in given):
            raise ConfigError(f"AtSteps must get steps of at least 0, got {min(given)}; leave it out")
        object.__setattr__(self, "steps", tuple(sorted(set(given))))

    def is_due(self, now: TrainingProgress, before: TrainingProgress) -> bool:
        """Pure; see :class:`Schedule`."""
        return now.step in self.steps


@dataclass(frozen=True)
class LogSpaced:
    """``per_decade`` evaluations from each power of ten to the next: dense at the start, where MIR moves most.

    LogSpaced(5) is 1, 2, 3, 4, 6, 10, 16, 25, 40, 63, 100, 158, ...
    """

    per_decade: int = 5

    def __post_init__(self) -> None:
        """Check the number."""
        if isinstance(self.per_decade, bool) or not isinstance(self.per_decade, int) or self.per_decade < 1:
            raise ConfigError(
                f"LogSpaced must get an integer of at least 1 evaluation per decade, got {self.per_decade!r}; use e.g. "
                "LogSpaced(5)"
            )

    def is_due(self, now: TrainingProgress, before: TrainingProgress) -> bool:
        """Pure; see :class:`Schedule`."""
        if now.step < 1:
            return False
        near = round(self.per_decade * math.log10(now.step))
        return any(round(10 ** (k / self.per_decade)) == now.step for k in range(max(near - 1, 0), near + 2))


@dataclass(frozen=True)
class TimeShare:
    """At most this part of the time: TimeShare(0.05) evaluates as often as 5 % of the wall time allow.

    The distance to the next evaluation follows from what evaluations and steps have cost so far, by rank 0's clock.
    Evaluations at events count, but are not held back: a short run with a start and an end may spend more.

    Ranks share the clock with each evaluation and 2, 4, 8, ... steps after it, never at every step.
    """

    share: float

    def __post_init__(self) -> None:
        """Check the number."""
        _check_positive("TimeShare", self.share, "of the time", "0.05")
        if self.share >= 1:
            raise ConfigError(f"TimeShare must get a part below 1, got {self.share!r}; 5 % is TimeShare(0.05)")

    def is_due(self, now: TrainingProgress, before: TrainingProgress) -> bool:
        """Pure; see :class:`Schedule`."""
        due = self.next_step(now.pace)
        return due is not None and now.step >= due

    def next_step(self, pace: Pace) -> int | None:
        """The step of the next evaluation as far as ``pace`` tells; None while a step's time is unknown."""
        if pace.eval_cost is None or pace.evaluated_at is None:
            return pace.step + 1  # soon, to learn what one costs
        if pace.step_seconds is None:
            return None
        per_second = (1 - self.share) / self.share  # training seconds that pay for one second of evaluation
        # After the next one the share must hold over the whole run, and for that one alone: what a long stall has
        # saved up is not spent in a burst.
        owed = (pace.eval_seconds + pace.eval_cost) * per_second - pace.train_seconds
        whole = pace.step + math.ceil(owed / pace.step_seconds) if pace.step_seconds > 0 else pace.step
        alone = pace.eval_cost * per_second / pace.step_seconds if pace.step_seconds > 0 else 0
        return max(whole, pace.evaluated_at + math.ceil(alone), pace.evaluated_at + 1)

    @staticmethod
    def reads_clock(step: int, pace: Pace, began: int) -> bool:
        """Whether ranks share the clock after ``step``: 2, 4, 8, ... steps after the last evaluation or restart."""
        passed = step - max(began, pace.evaluated_at or 0)
        return passed >= 2 and passed & (passed - 1) == 0


def as_schedule(every: Any) -> Schedule:
    """The schedule that ``every=`` means: a number of steps, a schedule, or its form on a command line.

    ``"50"`` is every 50 steps, ``"0.1ep"`` EveryEpochs(0.1), ``"log5"`` LogSpaced(5), ``"5%"`` TimeShare(0.05) and
    ``"10,100,1000"`` AtSteps((10, 100, 1000)).

    Raises:
        ConfigError: of no known form, or a number breaks its rule.
    """
    if isinstance(every, Schedule) and not isinstance(every, type):
        return every
    if not isinstance(every, str):
        return EverySteps(every)
    words = every.strip().lower()
    try:
        if words.endswith("ep"):
            return EveryEpochs(float(words[:-2]))
        if words.endswith("%"):
            return TimeShare(float(words[:-1]) / 100)
        if words.startswith("log"):
            return LogSpaced(int(words[3:]))
        if "," in words:
            return AtSteps(tuple(int(word) for word in words.split(",") if word.strip()))
        return EverySteps(int(words))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"every={every!r} is no schedule; write {_FORMS}") from error


def describe(schedule: Schedule) -> str:
    """A schedule in words that are the same on every rank if it is."""
    known = type(schedule).__module__ == __name__
    return repr(schedule) if known else type(schedule).__qualname__


def due_steps(schedule: Schedule, max_steps: int, epochs: float) -> list[int]:
    """The steps at which a schedule that knows no clock is due in a run of ``max_steps`` over ``epochs`` epochs."""
    moments = [TrainingProgress(step, step * epochs / max_steps) for step in range(max_steps + 1)]
    return [now.step for before, now in zip(moments, moments[1:], strict=False) if schedule.is_due(now, before)]


def _check_positive(name: str, value: Any, unit: str, example: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"{name} must get a positive number ({unit}), got {value!r}; use e.g. {name}({example})")


# Besides the schedule: before the first step, after the last, at each evaluation of the Trainer, at each checkpoint.
EVENTS = ("start", "end", "evaluate", "save")
DEFAULT_EVENTS = ("start", "end")


def check_events(also_on: Any) -> tuple[str, ...]:
    """The events to evaluate at, in the order of :data:`EVENTS`; from a collection, or names with commas, or "none".

    Raises:
        ConfigError: not a collection of names of events.
    """
    if isinstance(also_on, str):
        words = [word.strip() for word in also_on.split(",") if word.strip()]
        also_on = [] if words == ["none"] else words
    if not isinstance(also_on, Collection) or any(event not in EVENTS for event in also_on):
        raise ConfigError(
            f"also_on must be a collection of {', '.join(EVENTS)}, got {also_on!r}; the default is {DEFAULT_EVENTS}"
        )
    return tuple(event for event in EVENTS if event in also_on)


def is_due_at_start(
    schedule: Schedule, events: Collection[str], moment: TrainingProgress, history: Sequence[EvalRecord]
) -> bool:
    """Whether to evaluate before training goes on, where an uninterrupted run would have done so. Ranks: pure.

    ``moment`` is step 0, or where the run is resumed; ``history`` has the evaluations before it.
    """
    if "start" in events and not any(record.mir is not None for record in history):
        return True
    at_checkpoint = moment.step > 0 and "save" in events
    return at_checkpoint or schedule.is_due(moment, moment)
