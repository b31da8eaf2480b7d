# SPDX-License-Identifier: Apache-2.0
"""`mir eval` of the original LLaVA's checkpoints, in its own environment: the values its runs measured themselves."""

import json

import pytest
import torch

from mir_callback.history import read_history
from tests.distributed.launch import run_process, run_ranks
from tests.llava.conftest import PYTHON
from tests.llava.test_original import EXAMPLE, arguments
from tests.samples import Evil


def train(assets, folder, **changes):
    """A run of the real training script that saves a checkpoint at every evaluation; its output folder."""
    words = arguments(assets, folder / "output", changes.pop("zero", None))
    changes = {"save_strategy": "steps", "save_steps": 2, **changes}
    for name, value in changes.items():
        if f"--{name}" in words:
            words[words.index(f"--{name}") + 1] = str(value)
        else:
            words += [f"--{name}", str(value)]
    run_ranks(
        "tests.llava.train_worker",
        folder,
        *["on", str(assets / "probe"), "--", *words],
        processes=2 if "deepspeed" in changes else None,
        python=PYTHON,
    )
    return folder / "output"


def mir_eval(assets, *arguments):
    probe = ["--images", assets / "probe" / "images", "--texts", assets / "probe" / "texts", "--num-samples", 5]
    command = ["-m", "mir_callback", "eval", *arguments, *probe, "--device", "cpu"]
    return run_process([str(word) for word in command], python=PYTHON)


def require_live_values(output):
    live = {record.step: record.mir for record in read_history(output / "mir_history.jsonl")}
    measured = {record.step: record.mir for record in read_history(output / "mir_eval.jsonl")}
    assert list(measured) == [2, 4]
    assert measured == pytest.approx({step: live[step] for step in measured}, abs=1e-6)


def test_projectors_have_the_values_the_run_measured_itself(assets, tmp_path):
    # Stage 1 with the token for image patches, which makes the vocabulary larger than the base model's.
    output = train(assets, tmp_path, version="plain", data_path=assets / "data.json", mm_use_im_patch_token=True)
    assert sorted(path.name for path in (output / "checkpoint-2").iterdir()) == ["config.json", "mm_projector.bin"]
    done = mir_eval(assets, output)
    assert done.returncode == 0, done.stderr
    require_live_values(output)
    for step, base in ((2, "nowhere/at/all"), (4, None)):
        file = output / f"checkpoint-{step}" / "config.json"
        config = json.loads(file.read_text())
        config.pop("_name_or_path")
        file.write_text(json.dumps({**config, **({"_name_or_path": base} if base else {})}))
    done = mir_eval(assets, output, "--again")
    assert done.returncode == 2
    assert "nowhere/at/all does not exist" in done.stderr
    assert "_name_or_path in config.json does not name its base model" in done.stderr
    assert "Traceback" not in done.stderr
    done = mir_eval(assets, output, "--again", "--base", assets / "tiny-vicuna")
    assert done.returncode == 0, done.stderr
    require_live_values(output)
    file = output / "checkpoint-2" / "mm_projector.bin"
    torch.save({**torch.load(file), "evil": Evil(str(tmp_path / "ran"))}, file)
    done = mir_eval(assets, output, "--steps", "2", "--base", assets / "tiny-vicuna")
    assert (done.returncode, (tmp_path / "ran").exists()) == (2, False)
    for named in (str(file), "posix.mkdir", "--trust-checkpoint"):
        assert named in done.stderr


@pytest.mark.slow
def test_whole_models_have_the_values_the_run_measured_itself(assets, tmp_path):
    output = train(assets, tmp_path, tune_mm_mlp_adapter=False)
    done = mir_eval(assets, output)
    assert done.returncode == 0, done.stderr
    require_live_values(output)


@pytest.mark.slow
def test_zero3_shards_have_the_values_the_run_measured_itself(assets, tmp_path):
    zero = json.loads((EXAMPLE / "zero3.json").read_text())
    zero["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps(zero))
    output = train(assets, tmp_path, zero=3, deepspeed=file, tune_mm_mlp_adapter=False)
    assert not list((output / "checkpoint-2").glob("*.safetensors"))
    # The script's cast of the tower to float16 does not reach its shards.
    done = mir_eval(assets, output, "--prompt", "plain", "--vision-dtype", "float32")
    assert done.returncode == 0, done.stderr
    require_live_values(output)
