# SPDX-License-Identifier: Apache-2.0
"""How the time is spent: training or evaluations, by rank 0's clock, carried over restarts in the history."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mir_callback import distributed
from mir_callback.record import EvalRecord
from mir_callback.schedule import Pace, Schedule, TimeShare


class Clock:
    """Adds up the time of training and of evaluations.

    Only rank 0's clock counts, a monotonic one: what others know is what was shared last.

    Args:
        now: seconds since any fixed moment; never goes back.

    Attributes:
        pace: what was shared last, the same on every rank.
        began: the step at which this process began to train.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.pace = Pace()
        self.began = 0
        self._now = now
        self._lap = now()  # when the present stretch of training or evaluation began
        self._evaluating = False
        self._train_seconds = 0.0
        self._eval_seconds = 0.0
        self._stretch = 0.0, 0  # training time and step after the last evaluation
        self._paid = 0.0  # evaluation time when the last evaluation was shared: what came after it is part of the next

    def begin(self, step: int, records: Sequence[EvalRecord]) -> None:
        """Start at ``step``, after these evaluations of the run (the same on every rank).

        Steps between the last evaluation and ``step`` count with the time of a step that was known then.
        Ranks: each for itself.
        """
        last = next((record for record in reversed(records) if record.train_seconds is not None), None)
        pace = Pace(step)
        if last is not None:
            pace = Pace(
                step=step,
                evaluated_at=last.step,
                train_seconds=(last.train_seconds or 0.0) + (step - last.step) * (last.step_seconds or 0.0),
                eval_seconds=last.eval_seconds or 0.0,
                eval_cost=last.eval_cost,
                step_seconds=last.step_seconds,
            )
        self.pace, self.began = pace, step
        self._train_seconds, self._eval_seconds = pace.train_seconds, pace.eval_seconds
        self._paid, self._stretch = pace.eval_seconds, (pace.train_seconds, step)
        self._lap, self._evaluating = self._now(), False

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """What happens inside is an evaluation, everything else is training. Ranks: each for itself."""
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    def share(self, step: int) -> Pace:
        """Read rank 0's clock, in an evaluation of ``step`` or between two. Ranks: collective."""
        self._switch(self._evaluating)
        trained, first = self._train_seconds - self._stretch[0], self._stretch[1]
        before = self.pace
        mine = Pace(
            step=step,
            evaluated_at=step if self._evaluating else before.evaluated_at,
            train_seconds=self._train_seconds,
            eval_seconds=self._eval_seconds,
            eval_cost=self._eval_seconds - self._paid if self._evaluating else before.eval_cost,
            step_seconds=trained / (step - first) if step > first else before.step_seconds,
        )
        self.pace = distributed.broadcast_object(mine)
        if self._evaluating:
            self._paid, self._stretch = self._eval_seconds, (self._train_seconds, step)
        return self.pace

    def follow(self, schedule: Schedule, step: int) -> None:
        """Read rank 0's clock after a training step if ``schedule`` needs it there. Ranks: collective if it does."""
        if isinstance(schedule, TimeShare) and schedule.reads_clock(step, self.pace, self.began):
            self.share(step)

    def _switch(self, evaluating: bool) -> None:
        """Book the stretch that ends now."""
        now = self._now()
        if self._evaluating:
            self._eval_seconds += now - self._lap
        else:
            self._train_seconds += now - self._lap
        self._lap, self._evaluating = now, evaluating
