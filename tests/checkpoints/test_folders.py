# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints a folder stands for, of which run and step, and what the Trainer's own files tell besides."""

import json

import pytest

from mir_callback.checkpoints.discover import find_checkpoints, read_trainer_state
from mir_callback.checkpoints.load import fetch_folder, is_local
from mir_callback.errors import ConfigError
from mir_callback.record import EvalRecord

WEIGHTS = ("config.json", "model.safetensors")


def put_weights(folder):
    """What makes a folder one with weights, as far as is looked at before they are opened."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in WEIGHTS:
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of steps 2 and 4."""
    for step in (2, 4):
        put_weights(tmp_path / "run" / f"checkpoint-{step}")
    return tmp_path / "run"


def found_in(folder):
    return [(checkpoint.name, checkpoint.step) for checkpoint in find_checkpoints(folder).checkpoints]


TWO = [("checkpoint-2", 2), ("checkpoint-4", 4)]


def test_weights_in_the_runs_folder_are_left_out_when_nothing_tells_their_step(run):
    put_weights(run)
    (run / "mir_history.jsonl").write_text('{"step": 0, "mir": 1.0}\n{"step": 6, "mir": 1.0}\n')
    found = find_checkpoints(run)
    assert found_in(run) == TWO
    assert f"skipped the weights in {run} itself" in found.note
    assert "trainer.save_state()" in found.note
    assert "checkpoint-N" in found.note
    # And what it says helps.
    (run / "trainer_state.json").write_text('{"global_step": 6}')
    assert found_in(run) == [*TWO, ("run", 6)]
    assert find_checkpoints(run).note is None


def test_weights_in_the_runs_folder_count_once_when_they_are_of_a_checkpoints_step(run):
    put_weights(run)
    (run / "trainer_state.json").write_text('{"global_step": 4}')
    assert found_in(run) == TWO
    (run / "trainer_state.json").write_text('{"global_step": 3}')
    assert found_in(run) == [("checkpoint-2", 2), ("run", 3), ("checkpoint-4", 4)]


def test_step_of_a_finished_model_is_marked_a_guess_when_nothing_tells_it(tmp_path):
    model = put_weights(tmp_path / "model")
    (only,) = find_checkpoints(model).checkpoints
    assert (only.step, only.step_known) == (0, False)
    (model / "trainer_state.json").write_text('{"global_step": 0}')
    (only,) = find_checkpoints(model).checkpoints
    assert (only.step, only.step_known) == (0, True)


@pytest.mark.parametrize("torn", [b'{"global_step": 6, "log_his', b"\xff\xfe", b"[]", b"[" * 100_000])
def test_torn_state_of_a_run_keeps_no_checkpoint_from_being_found(run, torn):
    (run / "trainer_state.json").write_bytes(torn)
    assert found_in(run) == TWO
    assert find_checkpoints(run).error is None  # no weights that it could be of
    put_weights(run)
    assert found_in(run) == TWO
    assert str(run / "trainer_state.json") in str(find_checkpoints(run).error)


def test_names_are_those_a_trainer_writes_when_steps_are_told_by_them(run):
    for name in ("checkpoint-04", "checkpoint-٣", "checkpoint-3²", "checkpoint-+3", "checkpoint-", "checkpoint-4-old"):
        put_weights(run / name)
    assert found_in(run) == TWO
    put_weights(run / "checkpoint-0")
    assert found_in(run) == [("checkpoint-0", 0), *TWO]


def test_run_is_that_of_the_link_when_a_checkpoint_lies_on_another_disk(run, tmp_path):
    (run / "mir_history.jsonl").touch()
    (tmp_path / "disk").mkdir()
    for name in ("moved", "checkpoint-6"):
        put_weights(tmp_path / "disk" / name)
    (run / "checkpoint-6").symlink_to(tmp_path / "disk" / "checkpoint-6")
    (run / "checkpoint-8").symlink_to(tmp_path / "disk" / "moved")
    for step in (6, 8):
        (only,) = find_checkpoints(run / f"checkpoint-{step}").checkpoints
        assert (only.name, only.step, only.run) == (f"checkpoint-{step}", step, run)
    assert [step for _, step in found_in(run)] == [2, 4, 6, 8]


def test_run_is_that_of_the_target_when_the_link_is_a_name_for_a_runs_checkpoint(run, tmp_path, monkeypatch):
    (run / "mir_history.jsonl").touch()
    (run / "checkpoint-2" / "sub").mkdir()
    for link, target in (("newest", run / "checkpoint-4"), ("checkpoint-4", run / "checkpoint-4"), ("again", run)):
        (tmp_path / link).symlink_to(target)
    for link in ("newest", "checkpoint-4"):
        (only,) = find_checkpoints(tmp_path / link).checkpoints
        assert (only.name, only.step, only.run) == ("checkpoint-4", 4, run)
    assert {checkpoint.run for checkpoint in find_checkpoints(tmp_path / "again").checkpoints} == {run}
    monkeypatch.chdir(run / "checkpoint-4")
    assert found_in(tmp_path / "again" / "checkpoint-2" / "sub" / "..") == [("checkpoint-2", 2)]
    monkeypatch.chdir(run)
    assert found_in(type(run)(".")) == TWO


def test_run_of_shards_is_that_of_the_link_when_their_checkpoint_lies_on_another_disk(run, tmp_path):
    shards = tmp_path / "disk" / "moved" / "global_step6"
    shards.mkdir(parents=True)
    (shards / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    (run / "checkpoint-6").symlink_to(tmp_path / "disk" / "moved")
    (only,) = find_checkpoints(run / "checkpoint-6" / "global_step6").checkpoints
    assert (only.name, only.step, only.run, only.shards) == ("checkpoint-6", 6, run, "global_step6")


def test_error_is_one_line_when_the_note_of_the_newest_shards_is_no_text(tmp_path):
    (tmp_path / "latest").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="latest: .*global_step"):
        find_checkpoints(tmp_path)


def test_folder_is_missing_in_one_line_when_its_user_does_not_exist():
    assert is_local("~nosuchuser/run")
    with pytest.raises(ConfigError, match="~nosuchuser/run does not exist"):
        fetch_folder("~nosuchuser/run")


def read_state(run, **state):
    (run / "checkpoint-4" / "trainer_state.json").write_text(json.dumps(state))
    return read_trainer_state(find_checkpoints(run / "checkpoint-4").checkpoints[0])


def test_loss_is_the_newest_finite_one_when_others_are_not(run):
    log = [
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": float("nan")},
        {"step": 4, "loss": float("inf")},
        {"step": 4, "loss": 10**400},
        {"step": 4, "loss": "0.1"},
        {"step": 4, "loss": True},
        {"step": 5, "loss": 0.25},
        {"step": 4, "mir": 1.0},
    ]
    state = read_state(run, epoch=0.5, log_history=log, num_input_tokens_seen=7)
    assert state == EvalRecord(step=4, epoch=0.5, loss=0.5, loss_step=2, tokens_seen=7)


@pytest.mark.parametrize(
    "log",
    [None, 3, "loss", {"step": 4, "loss": 1.0}, [], [None, 3, "loss", ["loss"]], [{"step": 4, "loss": None}]],
)
def test_fields_are_none_when_the_log_holds_nothing_of_the_kind(run, log):
    state = read_state(run, log_history=log, epoch=float("nan"), num_input_tokens_seen=float("inf"))
    assert state == EvalRecord(step=4)


def test_loss_without_a_whole_step_is_kept_when_it_is_the_newest(run):
    for entry in ({"loss": 2.0}, {"loss": 2.0, "step": "4"}):
        assert read_state(run, log_history=[entry]) == EvalRecord(step=4, loss=2.0)


def test_fields_are_left_out_when_a_history_could_not_hold_them(run):
    state = read_state(run, log_history=[{"loss": 2.0, "step": -1}], epoch=-0.5, num_input_tokens_seen="7")
    assert state == EvalRecord(step=4, loss=2.0)
