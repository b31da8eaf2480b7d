# SPDX-License-Identifier: Apache-2.0
"""SIGKILL at every file operation on a history or a best model: what was whole before is whole afterwards."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

from tests.distributed.launch import run_ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    return run_ranks("tests.training.kill_worker", folder, processes=None)[0]


@pytest.mark.parametrize(("step", "kept"), [(100, [0, 50, 100]), (50, [0, 50]), (0, [])])
def test_no_record_is_lost_when_a_process_is_killed_while_it_continues_a_history(found, step, kept):
    moments = found[f"resumed at {step}"]
    assert len(moments) >= 3
    for left, continued in moments:
        assert any(steps[:3] == [0, 50, 100] for steps in left), left
        assert continued[: len(kept)] == kept
        assert set(continued) <= {*kept, 150}


def test_whole_lines_stay_when_a_process_is_killed_in_the_middle_of_one(found):
    assert found["lines"] == [[0, 60]] * 4


def test_a_whole_best_model_is_there_at_every_moment_of_its_replacement(found):
    assert len(found["best"]) >= 10
    for moment in found["best"]:
        assert moment["whole"], moment
        assert moment["files"] == ["mir_best"]
        assert moment["numbers"] == [str(moment["step"])]
    steps = [moment["step"] for moment in found["best"]]
    assert steps == sorted(steps)
    assert set(steps) == {50, 100}


def test_the_model_kept_before_can_be_loaded_when_training_is_killed_while_it_saves_the_next(found):
    for folder, left in found["training"]:
        assert left == [".mir_best.new", "mir_best"]
        kept = Path(folder) / "mir_best"
        assert json.loads((kept / "mir_best.json").read_text())["step"] == 1
        AutoModelForImageTextToText.from_pretrained(kept)
