# SPDX-License-Identifier: Apache-2.0
"""Shards of torch.distributed.checkpoint, as FSDP runs of the Trainer and of Lightning leave them, and nothing runs."""

import pickle
import shutil
import tracemalloc

import peft
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from mir_callback import Probe, evaluate_mir
from mir_callback.checkpoints.discover import find_checkpoints
from mir_callback.checkpoints.trust import load_metadata
from mir_callback.errors import ConfigError
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


def save(states, folder):
    """Other shards in their place."""
    shutil.rmtree(folder, ignore_errors=True)
    dcp.save(states, checkpoint_id=folder, no_dist=True)


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
    status, _, error = mir(capsys, "run")
    assert status == 2
    assert not (tmp_path / "ran").exists()
    assert f"Refused a file in {shards}" in error


def test_metadata_that_changes_a_class_is_refused_and_leaves_it_as_it_is(shards, tmp_path, capsys):
    name = b"X\x04\0\0\0name"
    poison = b"cpathlib\nPosixPath\n" + b"N}" + name + name + b"s\x86b0"  # PosixPath.name = "name"
    plain = pickle.dumps(pickle.loads((shards / ".metadata").read_bytes()), protocol=2)
    (shards / ".metadata").write_bytes(plain[:2] + poison + plain[2:])
    before = vars(type(tmp_path)).get("name")
    try:
        status, _, error = mir(capsys, "run")
        assert vars(type(tmp_path)).get("name") is before
    finally:
        if before is None and "name" in vars(type(tmp_path)):
            del type(tmp_path).name
    assert status == 2
    assert "PosixPath" in error


@pytest.mark.parametrize(
    "code",
    [b"\x80\x05\x96" + (1 << 28).to_bytes(8, "little") + b".", b"\x80\x02Nr\x00\x00\x00\x01."],
    ids=["array of bytes", "place in the memo"],
)
def test_metadata_does_not_fill_memory(shards, code):
    (shards / ".metadata").write_bytes(code)
    tracemalloc.start()
    try:
        with pytest.raises(ConfigError, match="metadata"):
            load_metadata(shards / ".metadata")
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


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


def negative(metadata):
    huge(metadata)
    metadata.state_dict_metadata["state_dict.head.weight"].size = torch.Size([-1 << 30, 1 << 10])


def cut(change):
    """Chunks of a weight changed."""

    def changed(metadata):
        weight = metadata.state_dict_metadata["state_dict.vlm.lm_head.weight"]
        (chunk,) = weight.chunks
        weight.chunks = [
            type(chunk)(torch.Size([offset, 0]), torch.Size([size, chunk.sizes[1]]))
            for offset, size in change(chunk.sizes[0])
        ]

    return changed


def as_bytes(metadata):
    """A weight that torch would unpickle, with a size."""
    weight = metadata.state_dict_metadata["state_dict.vlm.lm_head.weight"]
    other = BytesStorageMetadata()
    other.size, other.properties = weight.size, weight.properties
    metadata.state_dict_metadata["state_dict.vlm.lm_head.weight"] = other


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (outside, "elsewhere"),
        (huge, "bytes"),
        (negative, "its tensors have"),
        (without_a_weight, "missing lm_head.weight"),
        (as_bytes, "missing lm_head.weight"),
        (cut(lambda rows: []), "part of state_dict.vlm.lm_head.weight"),
        (cut(lambda rows: [(0, rows // 2)]), "part of state_dict.vlm.lm_head.weight"),
        (cut(lambda rows: [(0, rows - 1), (0, rows - 1)]), "part of state_dict.vlm.lm_head.weight"),
        (cut(lambda rows: [(1, rows)]), "part of state_dict.vlm.lm_head.weight"),
        (cut(lambda rows: [(rows, -rows)]), "part of state_dict.vlm.lm_head.weight"),
    ],
)
def test_what_does_not_hold_the_model_is_refused_by_name(shards, capsys, change, said):
    edit(shards, change)
    status, _, error = mir(capsys, "run")
    assert status == 2
    assert said in error


@pytest.mark.parametrize("lacking", ["", "vision_tower"])
def test_two_models_of_one_architecture_are_told_of(shards, capsys, lacking):
    states = tiny_models.llava()[0].state_dict()
    trained = {f"vlm.{name}": value for name, value in states.items() if not lacking or lacking not in name}
    save({**trained, **{f"ema.{name}": value for name, value in states.items()}}, shards)
    status, _, error = mir(capsys, "run")
    assert status == 2
    assert "ema., vlm." in error


@pytest.mark.parametrize("prefix", ["", "model."])
def test_weights_that_the_model_does_not_have_are_refused_by_name(shards, capsys, prefix):
    states = tiny_models.llava(layers=5)[0].state_dict()
    save({f"{prefix}{name}": value for name, value in states.items()}, shards)
    status, _, error = mir(capsys, "run")
    assert status == 2
    assert "unexpected model.language_model.layers.3." in error


def test_optimizer_beside_weights_without_a_prefix_is_left_out(made, shards, capsys):
    states = tiny_models.llava(seed=3)[0].state_dict()
    others = {f"optim.state.{name}.exp_avg": torch.ones_like(value) for name, value in states.items()}
    save({**states, **others}, shards)
    status, _, error = mir(capsys, "run")
    assert status == 0, error
    assert read_history("run/mir_eval.jsonl")[0].mir == pytest.approx(made[1], abs=1e-8)


@pytest.fixture
def adapted(shards, tmp_path):
    """A model with an adapter, its base saved whole, and the settings of the adapter beside the shards."""
    model, processor = tiny_models.llava(seed=3)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(model, lora())
    model.peft_config["default"].save_pretrained(shards)
    return model, processor


def lora(**options):
    settings = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["multi_modal_projector"]}
    return peft.LoraConfig(**{**settings, "init_lora_weights": False, **options})


def trained(model):
    """Its trained weights, by their names in it."""
    return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize(
    ("states", "prefix"),
    [
        pytest.param(nn.Module.state_dict, "", marks=pytest.mark.slow),
        (trained, ""),
        pytest.param(peft.get_peft_model_state_dict, "model.", marks=pytest.mark.slow),
    ],
)
def test_adapter_has_the_value_of_its_run_also_without_the_frozen_weights(
    adapted, shards, tmp_path, capsys, states, prefix
):
    model, processor = adapted
    for weight in trained(model).values():
        weight += 0.1
    dcp.save(
        {f"{prefix}{name}": value for name, value in states(model).items()},
        checkpoint_id=shards / "pytorch_model_fsdp_0",
        no_dist=True,
    )
    (shards / ".metadata").unlink()
    status, _, error = mir(capsys, "run")
    assert status == 0, error
    expected = evaluate_mir(model, Probe.load(tmp_path / "probe.zip"), processor=processor).mir
    assert read_history("run/mir_eval.jsonl")[0].mir == pytest.approx(expected, abs=1e-6)


def test_adapter_without_its_settings_says_what_to_write(adapted, shards, capsys):
    save(peft.get_peft_model_state_dict(adapted[0]), shards)
    status, _, error = mir(capsys, "run")
    assert status == 2
    assert "adapter_config.json" in error


@pytest.mark.parametrize(
    ("states", "other", "said"),
    [
        (trained, lora(target_modules=["q_proj", "v_proj"]), "unexpected"),
        (peft.get_peft_model_state_dict, lora(target_modules=["q_proj", "v_proj"]), "unexpected"),
        (peft.get_peft_model_state_dict, lora(target_modules=["v_proj"]), "missing"),
        (peft.get_peft_model_state_dict, lora(r=4), "size"),
    ],
)
def test_another_adapter_than_its_settings_say_is_refused(adapted, shards, capsys, states, other, said):
    weights = states(peft.get_peft_model(tiny_models.llava(seed=3)[0], other))
    settings = (shards / "adapter_config.json").read_text()
    save({f"model.{name}": value for name, value in weights.items()}, shards)
    (shards / "adapter_config.json").write_text(settings)
    status, _, error = mir(capsys, "run")
    assert status == 2
    assert said in error


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
