# SPDX-License-Identifier: Apache-2.0
"""Time spent on training and on evaluations, by rank 0's clock; carried over restarts by the history."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mir_callback import distributed
from mir_callback.record import EvalRecord
from mir_callback.schedule import Pace, Schedule, TimeShare


class Clock:
    """Sums up the time of training and of evaluations on rank 0, which broadcasts it.

    Args:
        now: a monotonic clock, in seconds.

    Attributes:
        pace: the times as last broadcast; the same on every rank.
        began: the step at which this process began to train.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.pace = Pace()
        self.began = 0
        self._now = now
        self._lap = now()  # when it last switched between training and evaluation
        self._evaluating = False
        self._train_seconds = 0.0
        self._eval_seconds = 0.0
        self._since = 0.0, 0  # training time and step at the last evaluation
        self._booked = 0.0  # evaluation time at the last broadcast of one; what follows it belongs to the next

    def begin(self, step: int, records: Sequence[EvalRecord]) -> None:
        """Start at ``step`` of a run with these evaluations so far.

        Steps since the last of them are counted with the mean step time recorded there. Ranks: any.
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
        self._booked, self._since = pace.eval_seconds, (pace.train_seconds, step)
        self._lap, self._evaluating = self._now(), False

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Count the time inside as evaluation; everything else is training. Ranks: any."""
        self._switch(True)
        try:
            yield
        finally:
            self._switch(False)

    def share(self, step: int) -> Pace:
        """Broadcast rank 0's times, during an evaluation at ``step`` or after a step. Ranks: collective."""
        self._switch(self._evaluating)
        trained, first = self._train_seconds - self._since[0], self._since[1]
        before = self.pace
        mine = Pace(
            step=step,
            evaluated_at=step if self._evaluating else before.evaluated_at,
            train_seconds=self._train_seconds,
            eval_seconds=self._eval_seconds,
            eval_cost=self._eval_seconds - self._booked if self._evaluating else before.eval_cost,
            step_seconds=trained / (step - first) if step > first else before.step_seconds,
        )
        self.pace = distributed.broadcast_object(mine)
        if self._evaluating:
            self._booked, self._since = self._eval_seconds, (self._train_seconds, step)
        return self.pace

    def follow(self, schedule: Schedule, step: int) -> None:
        """Broadcast rank 0's times after a training step if ``schedule`` needs them. Ranks: collective."""
        if isinstance(schedule, TimeShare) and schedule.reads_clock(step, self.pace, self.began):
            self.share(step)

    def _switch(self, evaluating: bool) -> None:
        """Add the time since the last switch to training or evaluation."""
        now = self._now()
        if self._evaluating:
            self._eval_seconds += now - self._lap
        else:
            self._train_seconds += now - self._lap
        self._lap, self._evaluating = now, evaluating
