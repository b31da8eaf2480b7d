# SPDX-License-Identifier: Apache-2.0
"""The disk of the output folder is full, limited, or read-only: training goes on, and whole lines stay whole."""

import re

import pytest

from mir_callback.history import History
from tests.faults.places import read_only, small_disk
from tests.faults.runs import run_broken
from tests.faults.train_worker import FAULT_STEP, STEPS

pytestmark = pytest.mark.faults

__all__ = ["read_only", "small_disk"]


def check_went_on(run, message, every):
    steps = list(range(0, STEPS + 1, every))
    assert run.code == 0
    for rank in run.ranks:
        assert (rank["error"], rank["step"]) == (None, STEPS)
        assert [record.step for record in rank["history"]] == steps
    assert run.ranks[1]["warnings"] == []
    warnings = run.ranks[0]["warnings"]
    assert warnings
    lost = set()
    for warning in warnings:
        match = re.fullmatch(r"step (\d+): could not write MIR to disk: (.*)", warning)
        assert match, warning
        assert message in match[2]
        lost.add(int(match[1]))
    assert lost <= set(range(FAULT_STEP, FAULT_STEP + 4))
    # What could not be written at its step was written with the next line that could.
    kept = {record.step: record for record in run.ranks[0]["history"]}
    assert run.steps == steps
    assert all(record == kept[record.step] for record in run.records)


def test_training_goes_on_and_no_line_is_torn_when_a_write_breaks_off(tmp_path):
    check_went_on(run_broken(tmp_path, "file limit"), "File too large", every=2)


def test_training_goes_on_and_later_values_are_written_when_the_disk_was_full(small_disk):
    # At every step: the page of the disk that the file has already still takes a line or two.
    check_went_on(run_broken(small_disk, "full disk", every=1), "No space left on device", every=1)


def test_run_ends_before_its_first_step_when_the_output_folder_is_read_only(read_only):
    run = run_broken(read_only, "none")
    for rank in run.ranks:
        assert rank["step"] == 0
        assert "HistoryError" in rank["error"]
        assert "output_dir writable" in rank["error"]
        assert rank["seconds"] < 10


def test_every_rank_is_refused_before_its_first_step_when_another_run_is_in_the_folder(tmp_path):
    other = History()
    other.open(tmp_path / "run", 0, {})
    run = run_broken(tmp_path, "none")
    for rank in run.ranks:
        assert rank["step"] == 0
        assert "HistoryError" in rank["error"]
        assert "in use by another run" in rank["error"]
        assert "output_dir" in rank["error"]
    assert run.steps == []
    other.close()


def test_a_folder_that_is_deleted_during_a_run_is_made_again_with_all_values(tmp_path):
    run = run_broken(tmp_path, "no folder", every=2)
    assert run.code == 0
    assert run.steps == list(range(0, STEPS + 1, 2))
    assert [record.step for record in run.ranks[1]["history"]] == run.steps
    assert sum("was gone: wrote all" in warning for warning in run.ranks[0]["warnings"]) == 1
    assert run.ranks[1]["warnings"] == []
