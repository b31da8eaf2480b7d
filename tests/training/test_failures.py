# SPDX-License-Identifier: Apache-2.0
"""The failure policy and the watchdog on their own."""

import subprocess
import sys
import threading
import time

import pytest

from mir_callback.errors import ConfigError
from mir_callback.failures import FailurePolicy, Failures
from mir_callback.watchdog import EXIT_CODE, Watchdog


def test_only_the_first_evaluation_is_not_tolerated_when_warning():
    assert not FailurePolicy("warn").tolerates(first=True)
    assert FailurePolicy("warn").tolerates(first=False)
    assert not FailurePolicy("raise").tolerates(first=False)


def test_evaluations_end_after_failures_in_a_row_only():
    failures = Failures(FailurePolicy(max_failures=2))
    assert failures.count(True, "a") == {}
    assert failures.count(False, None) == {}
    assert failures.count(True, "a") == {}
    assert (
        "2 evaluations in a row have failed (max_failures=2), the last with b" in failures.count(True, "b")["disabled"]
    )
    assert failures.disabled
    failures.reset()
    assert not failures.disabled


def test_there_is_no_end_when_max_failures_is_none():
    failures = Failures(FailurePolicy(max_failures=None))
    assert [failures.count(True, "a") for _ in range(9)] == [{}] * 9


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FailurePolicy("ignore"), "on_error must be one of warn, raise, got 'ignore'"),
        (lambda: FailurePolicy(max_failures=0), "max_failures must be an integer of at least 1, or None"),
        (lambda: Watchdog(0.0), "watchdog_seconds must be a positive number of seconds, or None"),
        (lambda: Watchdog(float("inf")), "watchdog_seconds must be a positive number"),
        (lambda: Watchdog(None, abort=True), "abort_on_hang must come with watchdog_seconds, got None"),
        (lambda: Watchdog(5, abort=1), "abort_on_hang must be True or False, got 1"),
    ],
)
def test_error_names_the_option_when_it_breaks_its_rule(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_phase_is_reported_with_its_stack_at_growing_intervals_when_it_lasts(capfd):
    with Watchdog(0.1).over("evaluation at step 7", rank=3) as tell:
        tell("forward of batch 2 of 9")
        time.sleep(0.5)
    said = capfd.readouterr().err
    assert (
        said.count("[mir] rank 3: STUCK? evaluation at step 7: forward of batch 2 of 9, for 0 s") == 3
    )  # after 0.1, 0.2, 0.4 s
    assert "time.sleep(0.5)" in said


def test_nothing_is_said_and_no_thread_is_left_when_phases_are_short(capfd):
    before = threading.active_count()
    with Watchdog(0.2).over("evaluation", rank=0) as tell:
        for _ in range(10):
            tell("a short phase")
            time.sleep(0.05)
    assert threading.active_count() == before
    assert capfd.readouterr().err == ""


def test_telling_costs_next_to_nothing():
    with Watchdog(60.0).over("evaluation", rank=0) as tell:
        started = time.perf_counter()
        for _ in range(10_000):
            tell("a phase")
        assert time.perf_counter() - started < 0.5


def test_process_ends_with_a_code_of_its_own_when_asked_to():
    code = (
        "import time; from mir_callback.watchdog import Watchdog\n"
        "with Watchdog(0.2, abort=True).over('evaluation', 0): time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == EXIT_CODE
    assert "ends itself with exit code 86 (abort_on_hang)" in done.stderr
