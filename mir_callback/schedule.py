# SPDX-License-Identifier: Apache-2.0
"""When an evaluation is due: schedules over optimizer steps, and events. Pure."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from mir_callback.errors import ConfigError
from mir_callback.record import EvalRecord

_EPSILON = 1e-9  # epochs are sums of fractions, with rounding errors
_FORMS = "50 (steps), 0.1ep (epochs), log5 (per decade), 5% (of the time) or 10,100,1000 (these steps)"


@dataclass(frozen=True)
class Pace:
    """Time spent so far, by rank 0's clock; the same on every rank. Sums include earlier processes of the run."""

    step: int = 0  # when the clock was read
    evaluated_at: int | None = None  # the step of the last evaluation, None before the first
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    eval_cost: float | None = None  # seconds of the last evaluation
    step_seconds: float | None = None  # mean of the training steps since the last evaluation

    def to_fields(self) -> dict[str, Any]:
        """The fields of a record."""
        names = ("train_seconds", "eval_seconds", "eval_cost", "step_seconds")
        return {name: getattr(self, name) for name in names}

    @property
    def time_share(self) -> float:
        """Fraction of the time so far spent on evaluations."""
        total = self.train_seconds + self.eval_seconds
        return self.eval_seconds / total if total > 0 else 0.0


@dataclass(frozen=True)
class TrainingProgress:
    """How far training has come; the same on every rank.

    Attributes:
        step: optimizer steps done.
        epoch: epochs done, with fraction.
        pace: times as last shared between ranks.
    """

    step: int
    epoch: float = 0.0
    pace: Pace = field(default_factory=Pace)


@runtime_checkable
class Schedule(Protocol):
    """When to evaluate: anything with this method can be passed as ``every``.

    Ranks: the method is called on every rank and must return the same there; it must be pure.

    Example:
        >>> class FirstHundred:
        ...     def is_due(self, now, before):
        ...         return now.step <= 100 and now.step % 10 == 0
        >>> isinstance(FirstHundred(), Schedule)
        True
    """

    def is_due(self, now: TrainingProgress, before: TrainingProgress) -> bool:
        """Whether to evaluate at ``now``; ``before`` is one step earlier, or the same when training starts."""
        ...


@dataclass(frozen=True)
class EverySteps:
    """Evaluate every ``steps`` optimizer steps; `every=50` is short for `every=EverySteps(50)`.

    Raises:
        ConfigError: ``steps`` is not a positive integer.

    Example:
        >>> due_steps(EverySteps(50), max_steps=200, epochs=1)
        [50, 100, 150, 200]
    """

    steps: int

    def __post_init__(self) -> None:
        """Check the number."""
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ConfigError(
                f"every must be a positive integer (optimizer steps) or a schedule such as EveryEpochs(0.1), got "
                f"{self.steps!r}"
            )

    def is_due(self, now: TrainingProgress, before: TrainingProgress) -> bool:
        """Pure; see :class:`Schedule`."""
        return now.step > 0 and now.step % self.steps == 0


@dataclass(frozen=True)
class EveryEpochs:
    """Evaluate every ``epochs`` epochs: at the first step that reaches each multiple.

    Raises:
        ConfigError: ``epochs`` is not a positive number.

    Example:
        >>> due_steps(EveryEpochs(0.25), max_steps=30, epochs=2)
        [4, 8, 12, 15, 19, 23, 27, 30]
    """

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
    """Evaluate at these optimizer steps; with `AtSteps(())` only at the events of ``also_on``.

    Raises:
        ConfigError: ``steps`` is not a collection of integers, or one of them is negative.

    Example:
        >>> AtSteps((1000, 10, 100))
        AtSteps(steps=(10, 100, 1000))
    """

    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        """Validate and sort the steps."""
        given: Any = self.steps
        if isinstance(given, str) or not isinstance(given, Collection) or any(type(step) is not int for step in given):
            raise ConfigError(f"AtSteps takes a collection of integers, e.g. AtSteps((10, 100)), got {given!r}")
        if any(step < 0 for step in given):
            raise ConfigError(f"AtSteps takes no negative steps, got {min(given)}")
        object.__setattr__(self, "steps", tuple(sorted(set(given))))

    def is_due(self, now: TrainingProgress, before: TrainingProgress) -> bool:
        """Pure; see :class:`Schedule`."""
        return now.step in self.steps


@dataclass(frozen=True)
class LogSpaced:
    """Evaluate ``per_decade`` times per power of ten: dense at the start, where MIR changes most.

    Raises:
        ConfigError: ``per_decade`` is not a positive integer.

    Example:
        >>> due_steps(LogSpaced(5), max_steps=200, epochs=1)
        [1, 2, 3, 4, 6, 10, 16, 25, 40, 63, 100, 158]
    """

    per_decade: int = 5

    def __post_init__(self) -> None:
        """Check the number."""
        if isinstance(self.per_decade, bool) or not isinstance(self.per_decade, int) or self.per_decade < 1:
            raise ConfigError(f"LogSpaced takes a positive integer, e.g. LogSpaced(5), got {self.per_decade!r}")

    def is_due(self, now: TrainingProgress, before: TrainingProgress) -> bool:
        """Pure; see :class:`Schedule`."""
        if now.step < 1:
            return False
        near = round(self.per_decade * math.log10(now.step))
        return any(round(10 ** (k / self.per_decade)) == now.step for k in range(max(near - 1, 0), near + 2))


@dataclass(frozen=True)
class TimeShare:
    """Evaluate as often as a fraction ``share`` of the wall time allows: TimeShare(0.05) for 5 %.

    When the next evaluation is due follows from what steps and evaluations have taken so far. Evaluations at events
    (``also_on``) count but are never postponed, so a short run may exceed the share.

    Raises:
        ConfigError: ``share`` is not between 0 and 1.

    Ranks: decided by rank 0's clock, which is broadcast at each evaluation and 2, 4, 8, ... steps after it.

    Example:
        >>> as_schedule("5%")
        TimeShare(share=0.05)
        >>> pace = Pace(step=10, evaluated_at=10, train_seconds=2.0, eval_seconds=1.0, eval_cost=1.0, step_seconds=0.2)
        >>> TimeShare(0.05).next_step(pace)
        190
    """

    share: float

    def __post_init__(self) -> None:
        """Check the number."""
        _check_positive("TimeShare", self.share, "fraction of the time", "0.05")
        if self.share >= 1:
            raise ConfigError(f"TimeShare takes a fraction below 1, got {self.share!r}. 5 % is TimeShare(0.05).")

    def is_due(self, now: TrainingProgress, before: TrainingProgress) -> bool:
        """Pure; see :class:`Schedule`."""
        due = self.next_step(now.pace)
        return due is not None and now.step >= due

    def next_step(self, pace: Pace) -> int | None:
        """The step of the next evaluation, estimated from ``pace``; None while the time of a step is unknown."""
        if pace.eval_cost is None or pace.evaluated_at is None:
            return pace.step + 1  # at once, to measure what one costs
        if pace.step_seconds is None:
            return None
        per_second = (1 - self.share) / self.share  # training seconds that pay for one second of evaluation
        # The share has to hold over the whole run and between this evaluation and the next: the time of a long stall
        # must not lead to a burst of evaluations.
        owed = (pace.eval_seconds + pace.eval_cost) * per_second - pace.train_seconds
        whole = pace.step + math.ceil(owed / pace.step_seconds) if pace.step_seconds > 0 else pace.step
        alone = pace.eval_cost * per_second / pace.step_seconds if pace.step_seconds > 0 else 0
        return max(whole, pace.evaluated_at + math.ceil(alone), pace.evaluated_at + 1)

    @staticmethod
    def reads_clock(step: int, pace: Pace, began: int) -> bool:
        """Whether rank 0's clock is broadcast after ``step``: 2, 4, 8, ... steps after an evaluation or restart."""
        passed = step - max(began, pace.evaluated_at or 0)
        return passed >= 2 and passed & (passed - 1) == 0


def as_schedule(every: Any) -> Schedule:
    """The schedule for a value of ``every``: an integer, a schedule, or a string as on a command line.

    Raises:
        ConfigError: it is none of these, or a number in it is out of range.

    Example:
        >>> [as_schedule(every) for every in (50, "0.1ep", "log5", "10,100")]
        [EverySteps(steps=50), EveryEpochs(epochs=0.1), LogSpaced(per_decade=5), AtSteps(steps=(10, 100))]
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
        raise ConfigError(f"every={every!r} is not a schedule. Use e.g. {_FORMS}.") from error


def describe(schedule: Schedule) -> str:
    """A schedule as text, to be compared between ranks: its repr, or the class of a user's own."""
    known = type(schedule).__module__ == __name__
    return repr(schedule) if known else type(schedule).__qualname__


def due_steps(schedule: Schedule, max_steps: int, epochs: float) -> list[int]:
    """When a schedule, other than TimeShare, is due in a run of ``max_steps`` steps and ``epochs`` epochs."""
    if isinstance(schedule, EverySteps):
        return list(range(schedule.steps, max_steps + 1, schedule.steps))
    pace, due = Pace(), []
    before = TrainingProgress(0, 0.0, pace)
    for step in range(1, max_steps + 1):
        now = TrainingProgress(step, step * epochs / max_steps, pace)
        if schedule.is_due(now, before):
            due.append(step)
        before = now
    return due


def _check_positive(name: str, value: Any, unit: str, example: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"{name} takes a positive number ({unit}), e.g. {name}({example}), got {value!r}")


# Before the first step, after the last, at each evaluation of the Trainer's own, at each checkpoint.
EVENTS = ("start", "end", "evaluate", "save")
DEFAULT_EVENTS = ("start", "end")


def check_events(also_on: Any) -> tuple[str, ...]:
    """Validate ``also_on``, a collection of events, or a comma-separated string or "none"; sorted as :data:`EVENTS`.

    Raises:
        ConfigError: it is none of these, or names an unknown event.
    """
    if isinstance(also_on, str):
        words = [word.strip() for word in also_on.split(",") if word.strip()]
        also_on = [] if words == ["none"] else words
    if not isinstance(also_on, Collection) or any(event not in EVENTS for event in also_on):
        raise ConfigError(
            f"also_on takes any of the events {', '.join(EVENTS)}, got {also_on!r}. The default is {DEFAULT_EVENTS}."
        )
    return tuple(event for event in EVENTS if event in also_on)


def is_due_at_start(
    schedule: Schedule, events: Collection[str], moment: TrainingProgress, history: Sequence[EvalRecord]
) -> bool:
    """Whether to evaluate before the first step, or on resuming where an uninterrupted run would have. Ranks: pure.

    ``moment`` is step 0 or the step that is resumed from, ``history`` the evaluations until then.
    """
    if "start" in events and not any(record.mir is not None for record in history):
        return True
    at_checkpoint = moment.step > 0 and "save" in events
    return at_checkpoint or schedule.is_due(moment, moment)
