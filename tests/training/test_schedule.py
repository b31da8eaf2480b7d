# SPDX-License-Identifier: Apache-2.0
"""When an evaluation is due."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mir_callback.errors import ConfigError
from mir_callback.record import EvalRecord
from mir_callback.schedule import (
    AtSteps,
    EveryEpochs,
    EverySteps,
    LogSpaced,
    Schedule,
    TimeShare,
    TrainingProgress,
    as_schedule,
    check_events,
    due_steps,
    is_due_at_start,
)

SCHEDULES = st.one_of(
    st.builds(EverySteps, st.integers(1, 60)),
    st.builds(EveryEpochs, st.floats(0.01, 5)),
    st.builds(AtSteps, st.lists(st.integers(0, 300), max_size=10).map(tuple)),
    st.builds(LogSpaced, st.integers(1, 12)),
)


def moments(first, last, steps_per_epoch):
    """Moments of a run as the Trainer counts them: whole epochs plus a fraction of one."""
    for step in range(first, last + 1):
        yield TrainingProgress(step, step // steps_per_epoch + (step % steps_per_epoch) / steps_per_epoch)


def due(schedule, first, last, steps_per_epoch):
    run = list(moments(first, last, steps_per_epoch))
    return [now.step for before, now in zip(run, run[1:], strict=False) if schedule.is_due(now, before)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (EverySteps(3), [3, 6, 9, 12, 15, 18]),
        (EveryEpochs(0.5), [4, 7, 11, 14, 18]),  # of 7 steps: at the first that has reached the half
        (EveryEpochs(2), [14]),
        (AtSteps((10, 2, 10, 0)), [2, 10]),
        (AtSteps(()), []),
        (LogSpaced(5), [1, 2, 3, 4, 6, 10, 16]),
        (LogSpaced(1), [1, 10]),
    ],
)
def test_due_at_the_steps_the_schedule_names(schedule, expected):
    assert due(schedule, 0, 20, steps_per_epoch=7) == expected


@given(st.integers(1, 40))
def test_log_spaced_steps_are_the_rounded_powers(per_decade):
    powers = {round(10 ** (k / per_decade)) for k in range(4 * per_decade)}
    assert due(LogSpaced(per_decade), 0, 2000, 100) == sorted(step for step in powers if step <= 2000)


@given(SCHEDULES, st.integers(1, 299), st.integers(1, 90))
def test_a_resumed_run_is_due_at_the_steps_of_an_unbroken_one(schedule, resumed_at, steps_per_epoch):
    whole = due(schedule, 0, 300, steps_per_epoch)
    assert due(schedule, 0, resumed_at, steps_per_epoch) + due(schedule, resumed_at, 300, steps_per_epoch) == whole


@given(st.sampled_from([0.05, 0.1, 0.2, 0.25, 0.5, 1.0, 2.0]), st.integers(20, 500))
def test_fractions_of_an_epoch_are_neither_missed_nor_doubled(epochs, steps_per_epoch):
    assert len(due(EveryEpochs(epochs), 0, 4 * steps_per_epoch, steps_per_epoch)) == round(4 / epochs)


def test_steps_of_a_planned_run():
    assert due_steps(EveryEpochs(0.5), 100, 2.0) == [25, 50, 75, 100]


def test_a_number_means_optimizer_steps_and_a_schedule_itself():
    class Own:
        def is_due(self, now, before):
            return now.step in (1, 7)

    own = Own()
    assert as_schedule(50) == EverySteps(50)
    assert as_schedule(own) is own
    assert isinstance(own, Schedule)


@pytest.mark.parametrize("every", [0, -5, 2.0, True, None, EverySteps])
def test_error_when_every_is_no_positive_integer(every):
    with pytest.raises(ConfigError, match=f"every.*{re.escape(repr(every))}"):
        as_schedule(every)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EveryEpochs(0), r"EveryEpochs.* 0"),
        (lambda: EveryEpochs(math.inf), "EveryEpochs.*inf"),
        (lambda: EveryEpochs("1"), "EveryEpochs.*'1'"),
        (lambda: TimeShare(-0.1), "TimeShare.*-0.1"),
        (lambda: TimeShare(5), "TimeShare.* 5"),
        (lambda: LogSpaced(0), "LogSpaced.* 0"),
        (lambda: AtSteps(10), "AtSteps.* 10"),
        (lambda: AtSteps("10"), "AtSteps.*'10'"),
        (lambda: AtSteps((1.5,)), "AtSteps.*1.5"),
        (lambda: AtSteps((-1, 2)), "AtSteps.*-1"),
        (lambda: check_events("save,stop"), "also_on.*start, end, evaluate, save.*'stop'"),
        (lambda: check_events(["stop"]), r"also_on.*\['stop'\]"),
        (lambda: check_events([["save"]]), r"also_on.*\[\['save'\]\]"),
    ],
)
def test_error_names_the_schedule_when_it_breaks_its_rule(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_events_are_put_in_order():
    assert check_events({"save", "start"}) == ("start", "save")
    assert check_events([]) == ()
    assert check_events("save, start") == ("start", "save")
    assert check_events("none") == ()


@pytest.mark.parametrize(
    ("events", "step", "history", "expected"),
    [
        (("start", "end"), 0, [], True),
        (("end",), 0, [], False),
        (
            ("start", "end"),
            30,
            [EvalRecord(step=0, mir=2.0)],
            False,
        ),  # an uninterrupted run would not have stopped by here
        (("start", "end"), 30, [], True),  # a checkpoint made without the callback
        (("start", "end"), 50, [EvalRecord(step=0, mir=2.0)], True),  # killed between the checkpoint and the evaluation
        (("save",), 30, [EvalRecord(step=0, mir=2.0)], True),
        (("save",), 0, [], False),
    ],
)
def test_due_at_the_start_of_a_process_when_an_unbroken_run_would_be(events, step, history, expected):
    assert is_due_at_start(EverySteps(50), events, TrainingProgress(step), history) is expected
