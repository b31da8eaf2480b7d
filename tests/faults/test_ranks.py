# SPDX-License-Identifier: Apache-2.0
"""One rank is killed, ended, stuck, or fails while all evaluate: who notices, after how long, what is on the disk."""

import pytest

from mir_callback.watchdog import EXIT_CODE
from tests.faults.runs import reports, run_broken
from tests.faults.train_worker import FAULT_STEP, STEPS

pytestmark = pytest.mark.faults

BEFORE = [0, 2]  # steps evaluated before the fault
ALL = [0, 2, 4, 6, 8]


@pytest.mark.parametrize("fault", ["sigkill", "sigterm", "sigkill main"])
def test_all_processes_end_and_the_history_is_whole_when_a_rank_is_killed(tmp_path, fault):
    run = run_broken(tmp_path, fault)
    assert run.code != 0
    assert run.seconds < 30
    assert run.steps == BEFORE
    assert all(record.mir is not None for record in run.records)


def test_all_processes_end_when_a_rank_is_killed_under_zero3(tmp_path):
    run = run_broken(tmp_path, "sigkill", "3")
    assert run.code != 0
    assert run.seconds < 30
    assert run.steps == BEFORE


def test_failure_on_one_rank_is_passed_over_by_all(tmp_path):
    run = run_broken(tmp_path, "fail")
    assert run.code == 0
    assert run.steps == ALL
    for rank in run.ranks:
        assert rank["step"] == STEPS
        failed = rank["history"][2]
        assert (failed.step, failed.mir) == (FAULT_STEP, None)
        assert failed.error.startswith("ForwardError: rank 1 failed: ForwardError: ")  # rank 0's, on all
        assert "RuntimeError: a device error on one rank" in failed.error
        assert all(record.mir is not None for record in rank["history"] if record is not failed)
    (warning,) = run.ranks[0]["warnings"]
    assert "step 4: MIR evaluation failed, training goes on" in warning
    assert run.ranks[1]["warnings"] == []


def test_failure_on_one_rank_ends_the_run_on_all_when_asked_to(tmp_path):
    run = run_broken(tmp_path, "fail", on_error="raise")
    assert run.steps == BEFORE
    assert [rank["step"] for rank in run.ranks] == [FAULT_STEP] * 2
    elsewhere, here = (rank["error"] for rank in run.ranks)
    assert elsewhere == f"ForwardError: rank 1 failed: {here}"
    assert here.startswith("ForwardError: ")
    assert "RuntimeError: a device error on one rank" in here


def test_every_rank_reports_where_it_is_and_the_job_ends_when_one_is_stuck(tmp_path):
    run = run_broken(tmp_path, "stall", watchdog_seconds=2, abort_on_hang=True)
    assert run.code != 0
    assert run.seconds < 30
    assert run.steps == BEFORE
    said = reports(run.output)
    assert said[1].startswith("STUCK? evaluation at step 4: forward of batch 1 of 2, for 2 s")
    assert "in stall\n" in said[1]
    assert said[0].startswith("STUCK? evaluation at step 4: waiting for the other ranks' forwards, for 2 s")
    assert "in sync_errors\n" in said[0]
    assert f"exitcode  : {EXIT_CODE}" in run.output


@pytest.mark.parametrize("setup", ["3", "fsdp2"])
def test_every_rank_reports_a_failure_in_a_forward_that_others_wait_in_and_the_job_ends(tmp_path, setup):
    # The other rank waits in a collective of ZeRO-3's or FSDP's own, which nobody can call it out of.
    run = run_broken(tmp_path, "fail", setup, abort_on_hang=True)
    assert run.code != 0
    assert run.seconds < 40  # not the 600 of watchdog_seconds
    assert run.steps == BEFORE
    said = reports(run.output)
    for rank in (0, 1):
        assert said[rank].startswith("STUCK: evaluation at step 4: ")
        assert "rank 1 failed in its forward: RuntimeError: a device error on one rank" in said[rank]
    assert f"exitcode  : {EXIT_CODE}" in run.output


@pytest.mark.parametrize("setup", ["3", "fsdp2"])
def test_failure_after_the_last_collective_of_a_forward_is_passed_over_by_all(tmp_path, setup):
    run = run_broken(tmp_path, "fail at last", setup, batch_size=3)  # one forward an evaluation
    assert run.code == 0
    assert run.steps == ALL
    assert reports(run.output) == {}
    for rank in run.ranks:
        assert rank["step"] == STEPS
        assert [record.step for record in rank["history"] if record.mir is None] == [FAULT_STEP]
        assert "RuntimeError: a device error on one rank" in rank["history"][2].error


def test_evaluations_end_with_a_last_word_after_failures_in_a_row(tmp_path):
    run = run_broken(tmp_path, "poison", max_failures=2)
    assert run.code == 0
    assert run.steps == [0, 2, 4, 6]
    for rank in run.ranks:
        assert rank["step"] == STEPS
        assert rank["history"][2].disabled is None
        assert rank["history"][3].disabled.startswith("MIR is off until a restart")
    assert [len(rank["warnings"]) for rank in run.ranks] == [3, 0]  # two failures, and the last word
    assert run.output.count("MIR is off until a restart") == 1
    assert run.records == run.ranks[0]["history"]
