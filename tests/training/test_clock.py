# SPDX-License-Identifier: Apache-2.0
"""Where the time goes, and evaluations that take at most a part of it; by a clock that the tests set."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mir_callback.clock import Clock
from mir_callback.record import EvalRecord
from mir_callback.schedule import EverySteps, Pace, TimeShare, TrainingProgress


class Run:
    """A training run with evaluations when due, as the callback does them, in which nothing but time passes."""

    def __init__(self, schedule, step=0, records=()):
        self.schedule, self.step, self.seconds = schedule, step, 1000.0
        self.clock = Clock(lambda: self.seconds)
        self.records = list(records)
        self.clock.begin(step, self.records)

    def evaluate(self, seconds, *, logging=0.0):
        with self.clock.evaluating():
            self.seconds += seconds
            self.records.append(EvalRecord(step=self.step, mir=2.0, **self.clock.share(self.step).to_fields()))
            self.seconds += logging

    def train(self, seconds, evaluation_seconds):
        self.seconds += seconds
        before = TrainingProgress(self.step, pace=self.clock.pace)
        self.step += 1
        self.clock.follow(self.schedule, self.step)
        if self.schedule.is_due(TrainingProgress(self.step, pace=self.clock.pace), before):
            self.evaluate(evaluation_seconds)

    def evaluated(self, after=-1):
        return [record.step for record in self.records if record.step > after]


def test_time_of_training_and_of_evaluations_add_up():
    run = Run(EverySteps(4))
    run.evaluate(5.0, logging=0.5)
    for _ in range(8):
        run.train(2.0, 3.0)
    expected = [
        Pace(0, 0, 0.0, 5.0, 5.0, None),
        Pace(4, 4, 8.0, 8.5, 3.5, 2.0),  # what came after the first one's record is paid with the second
        Pace(8, 8, 16.0, 11.5, 3.0, 2.0),
    ]
    fields = [pace.to_fields() for pace in expected]
    assert [{name: record[name] for name in fields[0]} for record in run.records] == fields
    assert run.clock.pace == expected[-1]
    assert run.clock.pace.time_share == pytest.approx(11.5 / 27.5)


def test_times_go_on_where_the_history_ends():
    run = Run(EverySteps(4))
    run.evaluate(5.0)
    for _ in range(8):
        run.train(2.0, 3.0)
    resumed = Run(EverySteps(4), 6, run.records[:2])  # two steps after the evaluation, their time is not written down
    assert resumed.clock.pace == Pace(6, 4, 12.0, 8.0, 3.0, 2.0)
    for _ in range(2):
        resumed.train(2.0, 3.0)
    assert resumed.records == run.records


def test_a_history_without_times_starts_them_anew():
    assert Run(EverySteps(4), 6, [EvalRecord(step=4, mir=2.0)]).clock.pace == Pace(6)


@settings(deadline=None, max_examples=40)
@given(
    share=st.floats(0.02, 0.5),
    step_seconds=st.floats(0.05, 20),
    steps_apart=st.floats(0.2, 100),
    jitter=st.floats(0, 0.3),
    seed=st.integers(0, 10**6),
)
def test_time_share_stays_below_its_budget_and_uses_it(share, step_seconds, steps_apart, jitter, seed):
    random = Random(seed)
    cost = steps_apart * step_seconds * share / (1 - share)
    run = Run(TimeShare(share))
    run.evaluate(cost * 2)  # the first one is slow
    for _ in range(2000):
        run.train(step_seconds * (1 + jitter * random.uniform(-1, 1)), cost * (1 + jitter * random.uniform(-1, 1)))
    assert run.clock.pace.time_share <= share * (1 + jitter) + 1e-9
    if steps_apart > 20:
        assert run.clock.pace.time_share >= share * (1 - jitter) * 0.8


@settings(deadline=None, max_examples=40)
@given(share=st.floats(0.02, 0.5), cost=st.floats(0.5, 20), resumed_at=st.integers(1, 999))
def test_time_share_of_a_resumed_run_is_due_where_an_unbroken_one_is(share, cost, resumed_at):
    whole = Run(TimeShare(share))
    whole.evaluate(cost)
    for _ in range(1000):
        whole.train(0.5, cost)
    kept = [record for record in whole.records if record.step <= resumed_at]
    resumed = Run(TimeShare(share), resumed_at, kept)
    for _ in range(1000 - resumed_at):
        resumed.train(0.5, cost)
    if len(kept) > 1:  # before the second one nobody has written down what a step takes
        assert resumed.evaluated() == pytest.approx(whole.evaluated(), abs=2)


def test_time_share_does_not_spend_the_savings_of_a_stall_in_a_burst():
    run = Run(TimeShare(0.1))
    run.evaluate(1.0)
    for seconds in [1.0] * 100 + [3600.0] + [1.0] * 90:
        run.train(seconds, 1.0)
    assert len(run.evaluated(after=101)) <= 10


def test_time_share_slows_down_when_evaluations_grow_dearer():
    run = Run(TimeShare(0.1))
    run.evaluate(1.0)
    for _ in range(200):
        run.train(1.0, 1.0)
    before = len(run.evaluated(after=100))
    for _ in range(400):
        run.train(1.0, 4.0)
    assert before > 2.5 * len(run.evaluated(after=500))
    assert run.clock.pace.time_share <= 0.1


def test_time_share_reads_the_clock_rarely():
    pace = Pace(evaluated_at=100)
    assert [step for step in range(101, 200) if TimeShare.reads_clock(step, pace, 0)] == [102, 104, 108, 116, 132, 164]
    assert [step for step in range(151, 200) if TimeShare.reads_clock(step, pace, 150)] == [152, 154, 158, 166, 182]
