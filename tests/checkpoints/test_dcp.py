# SPDX-License-Identifier: Apache-2.0
"""Shards of torch.distributed.checkpoint, as FSDP runs of the Trainer and of Lightning leave them, and nothing runs."""

import pickle
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from mir_callback import Probe, evaluate_mir
from mir_callback.checkpoints.discover import find_checkpoints
from mir_callback.history import read_history
from tests import tiny_models
from tests.commands.running import run_command
from tests.distributed.launch import run_ranks
from tests.samples import Evil, pairs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Shards of one process, the optimizer's too, beside another model; the model's value."""
    folder = tmp_path_factory.mktemp("made")
    model, processor = tiny_models.llava(seed=3)
    probe = Probe.from_pairs(pairs(5))
    probe.save(folder / "probe.zip")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    states = {f"state_dict.vlm.{name}": value for name, value in model.state_dict().items()}
    others = {"state_dict.head.weight": torch.ones(2, 3), "optimizer_0.state.vlm.lm_head.weight.step": torch.ones(())}
    dcp.save({**states, **others}, checkpoint_id=folder / "run" / "checkpoints" / "epoch=0-step=4.ckpt", no_dist=True)
    return folder, evaluate_mir(model, probe, processor=processor).mir


@pytest.fixture
def shards(made, tmp_path, monkeypatch):
    """A copy of them."""
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run" / "checkpoints" / "epoch=0-step=4.ckpt"


def mir(capsys, folder, base="base"):
    return run_command("eval", capsys, folder, "--base", base, "--probe", "probe.zip", "--device", "cpu")


def test_value_is_that_of_the_model_that_was_saved(made, shards, capsys):
    status, _, error = mir(capsys, "run")
    assert status == 0, error
    (record,) = read_history("run/mir_eval.jsonl")
    assert (record.step, record.mir) == (4, pytest.approx(made[1], abs=1e-8))
    assert record.checkpoint == "checkpoints/epoch=0-step=4.ckpt"


@pytest.mark.parametrize("place", [".", "run", "run/checkpoints", "run/checkpoints/epoch=0-step=4.ckpt"])
def test_run_is_where_the_history_is(shards, tmp_path, place):
    (tmp_path / "run" / "mir_history.jsonl").write_text("")
    if place == ".":  # as Lightning's loggers have it
        (tmp_path / "run" / "lightning_logs").mkdir()
        shutil.move(tmp_path / "run" / "checkpoints", tmp_path / "run" / "lightning_logs" / "version_0")
        place = "run/lightning_logs/version_0"
    (found,) = find_checkpoints(tmp_path / place).checkpoints
    assert (found.run, found.step) == (tmp_path / "run", 4)


def test_metadata_that_calls_anything_is_refused_and_does_not_run(shards, tmp_path, capsys):
    (shards / ".metadata").write_bytes(pickle.dumps(Evil(str(tmp_path / "ran"))))
    status, _, error = mir(capsys, "run")
    assert status == 2
    assert not (tmp_path / "ran").exists()
    assert "mkdir" in error
    assert str(shards / ".metadata") in error


def test_shard_that_calls_anything_does_not_run(shards, tmp_path, capsys):
    for shard in shards.glob("*.distcp"):
        size = shard.stat().st_size
        torch.save(Evil(str(tmp_path / "ran")), shard)
        with shard.open("ab") as file:
            file.truncate(size)
    assert mir(capsys, "run")[0] == 2
    assert not (tmp_path / "ran").exists()


def edit(shards, change):
    metadata = pickle.loads((shards / ".metadata").read_bytes())
    change(metadata)
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))


def outside(metadata):
    for info in metadata.storage_data.values():
        info.relative_path = "../elsewhere.distcp"


def huge(metadata):
    metadata.state_dict_metadata["state_dict.vlm.lm_head.weight"].size = torch.Size([1 << 30, 1 << 10])


def without_a_weight(metadata):
    del metadata.state_dict_metadata["state_dict.vlm.lm_head.weight"]


@pytest.mark.parametrize(
    ("change", "said"),
    [(outside, "elsewhere"), (huge, "bytes"), (without_a_weight, "lm_head.weight")],
)
def test_what_does_not_hold_the_model_is_refused_by_name(shards, capsys, change, said):
    edit(shards, change)
    status, _, error = mir(capsys, "run")
    assert status == 2
    assert said in error


def test_two_models_of_one_architecture_are_told_of(shards, capsys):
    states = {
        f"{who}.{name}": value for who in ("vlm", "ema") for name, value in tiny_models.llava()[0].state_dict().items()
    }
    dcp.save(states, checkpoint_id=shards, no_dist=True)
    status, _, error = mir(capsys, "run")
    assert status == 2
    assert "ema., vlm." in error


def test_shards_without_an_architecture_say_what_to_pass(shards, capsys):
    status, _, error = run_command("eval", capsys, "run", "--probe", "probe.zip", "--device", "cpu")
    assert status == 2
    assert "--base" in error


@pytest.mark.slow
@pytest.mark.parametrize("client", ["huggingface", "lightning"])
def test_shards_of_a_real_run_have_the_values_of_that_run(tmp_path, made, capsys, client):
    first, _ = run_ranks("tests.matrix.worker", tmp_path, "fsdp2 saving", client)
    values = {record["step"]: record["mir"] for record in first[client]["watched"]["history"] if record["step"]}
    run = tmp_path / client / "watched"
    status, _, error = run_command("eval", capsys, run, "--base", made[0] / "base", "--device", "cpu")
    assert status == 0, error
    assert {record.step: record.mir for record in read_history(run / "mir_eval.jsonl")} == pytest.approx(
        values, abs=1e-8
    )
