# SPDX-License-Identifier: Apache-2.0
"""Local work of an evaluation, now and beside something else."""

import threading
import time

import pytest
import torch

from mir_callback.engine.work import Background, run_now
from mir_callback.errors import NumericsError


def counting(log, pieces=3, fails=None):
    """Steps that note in which thread their communication and their work ran, and whether gradients were on."""

    def work(number):
        if number == fails:
            raise NumericsError(f"piece {number} went wrong")
        log.append((f"work {number}", threading.current_thread() is threading.main_thread(), torch.is_grad_enabled()))
        return number * 10

    total = 0
    try:
        for number in range(pieces):
            log.append((f"talk {number}", threading.current_thread() is threading.main_thread(), None))
            total += yield lambda number=number: work(number)
    finally:
        log.append(("end", None, None))
    return total


def test_work_is_done_in_order_and_here_when_run_now():
    log = []
    assert run_now(counting(log)) == 30
    assert [name for name, _, _ in log] == ["talk 0", "work 0", "talk 1", "work 1", "talk 2", "work 2", "end"]
    assert all(here for _, here, _ in log[:-1])


def test_work_leaves_the_main_thread_and_talk_stays_when_beside():
    log = []
    beside = Background(counting(log))
    while not beside.advance():
        time.sleep(0.001)
    assert beside.value == 30
    assert [name for name, _, _ in log] == ["talk 0", "work 0", "talk 1", "work 1", "talk 2", "work 2", "end"]
    for name, here, gradients in log[:-1]:
        assert here == name.startswith("talk")
        assert gradients in (None, False)


def test_nothing_is_waited_for_while_work_goes_on():
    gate = threading.Event()

    def steps():
        yield gate.wait
        return "done"

    beside = Background(steps())
    assert not beside.advance()
    assert not beside.finished
    gate.set()
    assert beside.advance(wait=True)
    assert beside.value == "done"


def test_steps_without_work_are_finished_at_once():
    beside = Background(counting([], pieces=0))
    assert beside.finished
    assert beside.advance()
    assert beside.value == 0


@pytest.mark.parametrize("drive", [run_now, lambda steps: Background(steps).advance(wait=True)])
def test_failing_work_fails_where_it_is_waited_for_and_ends_the_steps(drive):
    log = []
    with pytest.raises(NumericsError, match="piece 1 went wrong"):
        drive(counting(log, fails=1))
    assert log[-1][0] == "end"
