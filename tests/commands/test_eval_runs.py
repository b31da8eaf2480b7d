# SPDX-License-Identifier: Apache-2.0
"""`mir eval` of runs as they are found: weights of no known step, damaged files, moved checkpoints, closed pipes."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from mir_callback import MIRCallback, Probe
from mir_callback.history import read_history
from tests.commands.running import messages_of, run_command
from tests.distributed.launch import ROOT
from tests.samples import pairs
from tests.training.runs import make_trainer

PROBE = ["--probe", "probe.zip"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that measured itself at steps 0, 2 and 4 and saved checkpoints, and then its weights with no state."""
    folder = tmp_path_factory.mktemp("trained")
    probe = Probe.from_pairs(pairs(3))
    probe.save(folder / "probe.zip")
    trainer = make_trainer(folder / "run", steps=4, save_strategy="steps", save_steps=2)
    callback = MIRCallback(probe, every=2).attach(trainer)
    trainer.train()
    trainer.save_model(str(folder / "run"))
    return folder, {record.step: record.mir for record in callback.history}


@pytest.fixture
def live(trained, tmp_path, monkeypatch):
    """A copy of it in the working folder; its own values by step."""
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return trained[1]


def mir(capsys, *arguments):
    return run_command("eval", capsys, *arguments, "--device", "cpu")


def start(*arguments, **options):
    """`mir eval` as a process of its own."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    surroundings = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "mir_callback", "eval", *map(str, arguments), "--device", "cpu"]
    return subprocess.Popen(command, env=surroundings, stderr=subprocess.PIPE, text=True, **options)


def values(path="run/mir_eval.jsonl"):
    return {record.step: record.mir for record in read_history(path)}


def without(live, *steps):
    return pytest.approx({step: value for step, value in live.items() if step not in steps}, abs=1e-6)


def test_final_weights_are_not_taken_for_step_zero_when_nothing_tells_their_step(live, tmp_path, capsys):
    status, told, error = mir(capsys, "run", *PROBE)
    assert status == 0, error
    assert values() == without(live, 0)
    assert f"NOTE: skipped the weights in {tmp_path / 'run'} itself" in told
    status, told, error = mir(capsys, "run", *PROBE, "--steps", 0)
    assert status == 2
    assert "skipped the weights in" in told
    assert "no checkpoint of step 0" in error
    (tmp_path / "run" / "trainer_state.json").write_text('{"global_step": 5}')
    status, told, error = mir(capsys, "run", *PROBE)
    assert status == 0, error
    assert list(values()) == [2, 4, 5]
    assert "NOTE" not in told


def test_finished_model_is_not_compared_with_the_runs_first_value_when_nothing_tells_its_step(live, tmp_path, capsys):
    for step in (2, 4):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    status, told, error = mir(capsys, "run", *PROBE)
    assert status == 0, error
    assert values() == {0: pytest.approx(live[4], abs=1e-6)}
    assert "NOTE: the step of these weights is unknown" in told
    assert "step unknown  MIR " in told
    assert "in training" not in told
    (tmp_path / "run" / "mir_history.jsonl").unlink()
    status, told, error = mir(capsys, "run", *PROBE)
    assert status == 0, error
    assert "NOTE" not in told  # a model of its own, as of the hub


def test_first_checkpoint_is_compared_when_its_name_tells_that_it_is_step_zero(live, tmp_path, capsys):
    (tmp_path / "run" / "checkpoint-2").rename(tmp_path / "run" / "checkpoint-0")
    status, told, error = mir(capsys, "run", *PROBE, "--steps", 0)
    assert status == 0, error
    assert f"in training {live[0]:.4f}" in told


def edit_state(folder, change):
    file = folder / "trainer_state.json"
    state = json.loads(file.read_text())
    change(state)
    file.write_text(json.dumps(state))


def test_checkpoint_is_measured_when_losses_in_its_log_are_not_finite(live, tmp_path, capsys):
    def spoil(state):
        state["log_history"] += [{"step": 4, "loss": float("nan")}, {"step": 4, "loss": float("inf")}, None]

    edit_state(tmp_path / "run" / "checkpoint-4", spoil)
    edit_state(tmp_path / "run" / "checkpoint-2", lambda state: state.update(log_history="torn", epoch=float("nan")))
    status, _, error = mir(capsys, "run", *PROBE)
    assert status == 0, error
    assert values() == without(live, 0)
    first, second = read_history("run/mir_eval.jsonl")
    assert (first.epoch, first.loss, first.loss_step) == (None, None, None)
    assert second.loss_step == 4
    assert 0 < second.loss < 100


def test_error_is_of_the_damaged_state_alone_when_a_run_has_one(live, tmp_path, capsys):
    state = tmp_path / "run" / "trainer_state.json"
    state.write_text('{"global_step": 4, "log_hi')
    status, _, error = mir(capsys, "run", *PROBE)
    assert status == 2
    assert values() == without(live, 0)
    assert f"Could not read {state}" in error
    assert len(messages_of(error, "eval")) == 2
    # Named by their steps, others are not what was asked for.
    assert mir(capsys, "run", *PROBE, "--steps", 2)[0] == 0
    (tmp_path / "run" / "model.safetensors").unlink()
    status, told, error = mir(capsys, "run", *PROBE)
    assert (status, messages_of(error, "eval")) == (0, [])
    assert "trainer_state" not in told


def test_damaged_state_of_a_checkpoint_is_told_before_the_forward(live, tmp_path, capsys):
    state = tmp_path / "run" / "checkpoint-2" / "trainer_state.json"
    state.write_text("{")
    (state.parent / "model.safetensors").write_bytes(b"torn")
    status, _, error = mir(capsys, "run", *PROBE)
    assert status == 2
    assert f"Could not read {state}" in error
    assert list(values()) == [4]


def test_each_checkpoint_is_measured_once_when_names_are_alike(live, tmp_path, capsys):
    shutil.copytree("run/checkpoint-4", "run/checkpoint-04")
    shutil.copytree("run/checkpoint-4", "run/checkpoint-٣")
    assert mir(capsys, "run", *PROBE)[0] == 0
    assert values() == without(live, 0)
    assert mir(capsys, "run", *PROBE)[1].count("  cached  ") == 2


def test_checkpoint_on_another_disk_belongs_to_the_run_that_links_to_it(live, tmp_path, capsys):
    shutil.move("run/checkpoint-2", tmp_path / "disk" / "moved")
    (tmp_path / "run" / "checkpoint-2").symlink_to(tmp_path / "disk" / "moved")
    status, told, error = mir(capsys, "run/checkpoint-2")  # with the probe that lies in its run
    assert status == 0, error
    assert f"in training {live[2]:.4f}" in told
    assert list(values()) == [2]
    assert mir(capsys, "run")[1].count("  cached  ") == 1


@pytest.mark.parametrize("flags", [["~nosuchuser/run"], ["run", "--history", "~nosuchuser/h.jsonl", "--steps", "2"]])
def test_home_of_an_unknown_user_is_a_folder_like_any_other(live, capsys, flags):
    status, _, error = mir(capsys, *flags, *PROBE)
    assert "Traceback" not in error
    if flags[0] == "run":
        assert status == 0
        assert list(values("~nosuchuser/h.jsonl")) == [2]
    else:
        assert "~nosuchuser/run does not exist" in error


def test_place_of_values_is_told_as_a_plan_when_nothing_can_be_measured(live, tmp_path, capsys):
    for step in (2, 4):
        (tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors").write_bytes(b"torn")
    status, told, _ = mir(capsys, "run", *PROBE)
    assert status == 2
    assert f"writing to {tmp_path / 'run' / 'mir_eval.jsonl'}" in told
    assert not (tmp_path / "run" / "mir_eval.jsonl").exists()


def test_what_was_measured_is_kept_when_the_reader_of_records_has_gone(live, tmp_path, capsys):
    for step in range(6, 16, 2):
        shutil.copytree("run/checkpoint-4", f"run/checkpoint-{step}")
    reading, writing = os.pipe()
    process = start("run", *PROBE, "--json", stdout=writing, cwd=tmp_path)
    os.close(writing)
    with os.fdopen(reading) as reader:
        first = json.loads(reader.readline())  # told as soon as it is measured, and not when all are
        assert process.poll() is None
        assert first["step"] == 2
    process.communicate(timeout=120)
    assert process.returncode != 0
    kept = values()
    count = len(kept)
    assert 2 <= count < 7  # the second at least: measured, and only then found to have no reader
    assert list(kept) == list(range(2, 2 + 2 * count, 2))
    status, told, error = mir(capsys, "run", *PROBE)
    assert status == 0, error
    assert told.count("  cached  ") == count
    assert list(values()) == list(range(2, 16, 2))


@pytest.mark.slow
def test_values_of_two_processes_are_all_kept_when_they_share_a_file(live, tmp_path):
    for step in range(6, 22, 2):
        shutil.copytree("run/checkpoint-4", f"run/checkpoint-{step}")
    halves = [",".join(map(str, range(first, 22, 4))) for first in (2, 4)]
    processes = [start("run", *PROBE, "--steps", half, stdout=subprocess.PIPE, cwd=tmp_path) for half in halves]
    for process in processes:
        _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error
    assert list(values()) == list(range(2, 22, 2))
