# SPDX-License-Identifier: Apache-2.0
"""`mir eval` runs no code of a checkpoint that somebody made, unless the user says so, and honest ones still load."""

import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mir_callback import Probe
from mir_callback.checkpoints.trust import refuse_code
from mir_callback.errors import ConfigError
from mir_callback.history import read_history
from tests import tiny_models
from tests.checkpoints.shards_worker import STAGES
from tests.commands.running import run_command
from tests.distributed.adapter_worker import adapted
from tests.distributed.launch import run_ranks
from tests.samples import Evil, pairs


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Honest checkpoints: DeepSpeed shards, a model, an adapter; and the MIR of the shards by their stage."""
    folder = tmp_path_factory.mktemp("saved")
    (values,) = run_ranks("tests.checkpoints.shards_worker", folder, processes=1)
    model, processor = tiny_models.llava()
    model.save_pretrained(folder / "model")
    adapted(model, folder / "base", write=True).save_pretrained(folder / "adapter")
    for name in ("model", "adapter"):
        processor.save_pretrained(folder / name)
    return folder, {int(stage): value for stage, value in values.items()}


@pytest.fixture
def here(saved, tmp_path, monkeypatch):
    """A copy of them in the working folder; the folder."""
    shutil.copytree(saved[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def mir(capsys, *arguments):
    return run_command("eval", capsys, *arguments, "--probe", "probe.zip", "--device", "cpu")


@pytest.mark.parametrize("stage", STAGES)
def test_honest_shards_have_the_value_of_the_training(saved, here, capsys, stage):
    for flags in ([], ["--trust-checkpoint", "--again"]):
        status, _, error = mir(capsys, f"zero{stage}", *flags)
        assert status == 0, error
        (record,) = read_history(f"zero{stage}/mir_eval.jsonl")
        assert record.mir == pytest.approx(saved[1][stage], abs=1e-6)
    assert mir(capsys, f"zero{stage}")[1].count("  cached  ") == 1  # trust is no other way to measure


def poison(file, **more):
    torch.save({**torch.load(file, weights_only=False), **more, "evil": Evil("ran")}, file)


def as_pickle(file):
    """What a model's safetensors holds, as a pickle with code."""
    torch.save({**load_file(file), "evil": Evil("ran")}, file.parent / "weights.bin")
    file.unlink()
    return file.parent / "weights.bin"


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("zero2", "mp_rank_00_model_states.pt"),
        ("zero2", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ("zero3", "zero_pp_rank_0_mp_rank_00_model_states.pt"),
        ("zero3", "zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ("model", "pytorch_model.bin"),
        ("adapter", "adapter_model.bin"),
    ],
)
def test_a_pickle_with_code_is_refused_by_file_and_class_unless_trusted(here, capsys, model, file):
    if model.startswith("zero"):
        file = f"global_step1/{file}"
        poison(here / model / file)
    else:
        safe = here / model / file.replace(".bin", ".safetensors").replace("pytorch_", "")
        as_pickle(safe).rename(here / model / file)
    status, _, error = mir(capsys, model)
    assert status == 2
    assert not (here / "ran").exists()
    assert file in error
    assert "posix.mkdir" in error
    assert "--trust-checkpoint" in error
    assert "Traceback" not in error
    mir(capsys, model, "--trust-checkpoint")
    assert (here / "ran").exists()


@pytest.mark.filterwarnings("ignore:.*(TorchScript archive|pickle protocol)", "ignore:.*torch.jit.script")
@pytest.mark.parametrize("kind", ["pickle", "tar", "script"])
def test_no_other_format_of_torch_is_a_way_around(here, capsys, kind):
    file = here / "model" / "pytorch_model.bin"
    (here / "model" / "model.safetensors").unlink()
    if kind == "script":
        torch.jit.script(torch.nn.Linear(2, 2)).save(file)
    elif kind == "pickle":
        file.write_bytes(pickle.dumps(Evil("ran")))
    else:
        with tarfile.open(file, "w") as archive:
            for name in ("storages", "tensors", "pickle"):
                content = pickle.dumps(Evil("ran"))
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    status, _, error = mir(capsys, "model")
    assert (status, (here / "ran").exists()) == (2, False)
    assert "pytorch_model.bin" in error
    assert "--trust-checkpoint" in error


def test_pickles_are_refused_where_torch_cannot_open_them_safely(here, capsys, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    status, _, error = mir(capsys, "zero2")
    assert status == 2
    assert "torch 2.5.1" in error
    assert "mp_rank_00_model_states.pt" in error
    assert "--trust-checkpoint" in error
    assert mir(capsys, "zero2", "--trust-checkpoint")[0] == 0
    assert mir(capsys, "model")[0] == 0  # safetensors


CODE = "import os\nos.mkdir('ran')\nfrom transformers import LlavaProcessor as Own\n"


def edit(file, **changes):
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **changes}))


def bring_processor(here):
    (here / "model" / "own.py").write_text(CODE)
    edit(here / "model" / "processor_config.json", processor_class="Own", auto_map={"AutoProcessor": "own.Own"})
    edit(here / "model" / "tokenizer_config.json", processor_class="Own", auto_map={"AutoProcessor": "own.Own"})
    return "model"


def bring_kernel(here):
    edit(here / "model" / "config.json", attn_implementation="somebody/kernel")
    return "model"


def bring_inner_kernel(here):
    inner = {"thinker_config": {"_attn_implementation_internal": "somebody/kernel"}}
    edit(here / "model" / "config.json", more=inner)
    return "model"


def bring_module(here):
    (here / "own.py").write_text(CODE)
    edit(here / "adapter" / "adapter_config.json", megatron_config={"a": 1}, megatron_core="own")
    return "adapter"


@pytest.mark.parametrize(
    ("bring", "named"),
    [
        (bring_processor, "model"),
        (bring_kernel, "somebody/kernel"),
        (bring_inner_kernel, "somebody/kernel"),
        (bring_module, "megatron"),
    ],
)
def test_python_code_that_a_checkpoint_names_is_not_imported(here, capsys, bring, named):
    status, _, error = mir(capsys, bring(here))
    assert (status, (here / "ran").exists()) == (2, False)
    assert named in error
    assert "Traceback" not in error


def test_a_class_that_is_no_model_is_refused_by_name(here, capsys):
    edit(here / "model" / "config.json", architectures=["AutoTokenizer"])
    status, _, error = mir(capsys, "model")
    assert status == 2
    assert "AutoTokenizer" in error


def test_a_refusal_that_a_loader_passes_over_is_raised_and_everything_is_put_back(here):
    torch.save(Evil("ran"), "evil.pt")
    load = torch.load

    def careless():
        try:
            torch.load("evil.pt", weights_only=False)
        except Exception:
            return

    with pytest.raises(ConfigError, match=r"evil\.pt"), refuse_code(Path("run"), trusted=False):
        careless()
    assert torch.load is load
    assert not (here / "ran").exists()


def test_scaled_losses_of_float16_runs_are_known(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(2.0**16, 1000, 1.0, 2, False, False, torch.float16)
    torch.save(scaler, tmp_path / "scaler.pt")
    with refuse_code(Path("run"), trusted=False):
        assert torch.load(tmp_path / "scaler.pt", weights_only=False).cur_scale == 2.0**16


def test_a_base_model_that_an_adapter_names_is_held_to_the_same_rules(here, capsys):
    (here / "base").exists()
    as_pickle(here / "base" / "model.safetensors").rename(here / "base" / "pytorch_model.bin")
    edit(here / "adapter" / "adapter_config.json", base_model_name_or_path=str(here / "base"))
    status, _, error = mir(capsys, "adapter")
    assert (status, (here / "ran").exists()) == (2, False)
    assert "base/pytorch_model.bin" in error


def test_a_probe_needs_no_trust(tmp_path):
    Probe.from_pairs(pairs(2)).save(tmp_path / "probe.zip")
    with refuse_code(Path("run"), trusted=False):
        assert len(Probe.load(tmp_path / "probe.zip")) == 2
