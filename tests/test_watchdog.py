# SPDX-License-Identifier: Apache-2.0
"""The watchdog on its own."""

import subprocess
import sys
import threading
import time

from mir_callback.watchdog import EXIT_CODE, enter_phase, watchdog


def test_phase_is_reported_with_its_stack_at_growing_intervals_when_it_lasts(capfd):
    with watchdog("evaluation at step 7", 3, 0.1):
        enter_phase("forward of batch 2 of 9")
        time.sleep(0.5)
    said = capfd.readouterr().err
    assert (
        said.count("[mir] rank 3: STUCK? evaluation at step 7: forward of batch 2 of 9, for 0 s") == 3
    )  # after 0.1, 0.2, 0.4 s
    assert "time.sleep(0.5)" in said


def test_a_failure_of_another_rank_is_reported_once_where_the_phase_waits_for_it(capfd, monkeypatch):
    monkeypatch.setattr("mir_callback.watchdog._ASK_SECONDS", 0.05)
    monkeypatch.setattr("mir_callback.watchdog._longest", 0.0)
    with watchdog("evaluation at step 7", 3, 60):
        enter_phase("forward of batch 2 of 9", lambda: "rank 1 failed in its forward: no memory")
        time.sleep(0.5)
        enter_phase("solving")  # waits for nobody
        time.sleep(0.2)
    said = capfd.readouterr().err
    assert said.count("STUCK: evaluation at step 7: forward of batch 2 of 9, for 0 s") == 1
    assert said.count("STUCK") == 1
    assert "rank 1 failed in its forward: no memory" in said
    assert "time.sleep(0.5)" in said


def test_a_phase_that_ends_after_another_rank_has_failed_is_not_reported(capfd, monkeypatch):
    monkeypatch.setattr("mir_callback.watchdog._ASK_SECONDS", 0.2)
    with watchdog("evaluation", 0, 60):
        enter_phase("forward", lambda: "rank 1 failed in its forward: no memory")
        time.sleep(0.3)
        enter_phase("waiting for the other ranks' forwards")
        time.sleep(0.3)
    assert capfd.readouterr().err == ""


def test_a_phase_is_given_twice_the_longest_before_it_when_another_rank_has_failed(capfd, monkeypatch):
    monkeypatch.setattr("mir_callback.watchdog._ASK_SECONDS", 0.05)
    monkeypatch.setattr("mir_callback.watchdog._longest", 0.0)
    failures = [None]
    with watchdog("evaluation", 0, 60):
        enter_phase("forward of batch 1 of 3", lambda: failures[-1])
        time.sleep(0.4)
        failures.append("rank 1 failed in its forward: no memory")
        enter_phase("forward of batch 2 of 3", lambda: failures[-1])
        time.sleep(0.6)  # slower than before, and it ends
        assert capfd.readouterr().err == ""
        enter_phase("forward of batch 3 of 3", lambda: failures[-1])
        time.sleep(1.6)
    assert "STUCK: evaluation: forward of batch 3 of 3" in capfd.readouterr().err


def test_nothing_is_said_and_no_thread_is_left_when_phases_are_short(capfd):
    before = threading.active_count()
    with watchdog("evaluation", 0, 0.2):
        for _ in range(10):
            enter_phase("a short phase")
            time.sleep(0.05)
    assert threading.active_count() == before
    assert capfd.readouterr().err == ""


def test_process_ends_with_a_code_of_its_own_when_asked_to():
    code = (
        "import time; from mir_callback.watchdog import watchdog\n"
        "with watchdog('evaluation', 0, 0.2, abort=True): time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == EXIT_CODE
    assert "exiting with code 86 (abort_on_hang)" in done.stderr
