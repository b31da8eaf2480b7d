# SPDX-License-Identifier: Apache-2.0
"""Two ranks whose clocks disagree evaluate at the same steps; a dry run ends on both."""

import pytest

from tests.distributed.launch import run_ranks


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("schedule")
    return folder, run_ranks("tests.distributed.schedule_worker", folder)


def test_ranks_evaluate_at_the_same_steps_when_their_clocks_disagree(run):
    first, second = run[1]
    steps = [record.step for record in first["history"]]
    assert [record.step for record in second["history"]] == steps
    assert steps[0] == 0
    assert steps[-1] == 40
    assert len(steps) > 2
    for ours, theirs in zip(first["history"], second["history"], strict=True):
        for name in ("train_seconds", "eval_seconds", "eval_cost", "step_seconds"):
            assert ours[name] == theirs[name]


def test_a_reporter_that_fails_on_one_rank_holds_up_nobody(run):
    first, second = run[1]
    assert (first["warnings"], second["warnings"]) == (1, 0)
    assert [step for step, _ in first["losses"]] == list(range(1, 41))


def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_said(tmp_path):
    said = run_ranks("tests.distributed.everywhere_worker", tmp_path)
    assert said == ["second on 1 of 2 ranks after 0.5 s. Come.", ""]


def test_a_dry_run_ends_on_every_rank_and_leaves_nothing(run):
    folder, ranks = run
    for rank in ranks:
        assert (rank["exit"], rank["steps"], rank["left"]) == (0, 0, [])
    assert (folder / "output.txt").read_text().count("[mir] dry run: MIR") == 1
