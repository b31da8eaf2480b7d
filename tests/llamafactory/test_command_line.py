# SPDX-License-Identifier: Apache-2.0
"""LLaMA-Factory's real package in its own environment: its command line under the launcher, nothing of its own changed.

`make test-all` builds that environment (`.venv-llamafactory`, pinned by constraints-llamafactory.txt).
"""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mir_callback import Probe, evaluate_mir
from mir_callback.history import read_history
from tests import tiny_models
from tests.distributed.launch import ROOT, run_process
from tests.training.digest import digest

pytestmark = pytest.mark.slow

PYTHON = Path(os.environ.get("MIR_LLAMAFACTORY_PYTHON", ROOT / ".venv-llamafactory" / "bin" / "python"))
STEPS = 4
PROCESSES = {
    "one process": {},
    "two processes that it starts itself": {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2"},
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    assert PYTHON.exists(), f"no {PYTHON}; `make test-all` builds it (or set MIR_LLAMAFACTORY_PYTHON)"
    folder = tmp_path_factory.mktemp("assets")
    made = run_process(["-m", "tests.llamafactory.assets", str(folder)], python=PYTHON)
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module", params=PROCESSES)
def runs(request, assets, tmp_path_factory):
    """Folder and output of a run with MIR, and the folder of one without."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--mir_probe", str(assets / "probe.zip"), "--mir_every", "2"]
    watched = train(assets, folder / "watched", PROCESSES[request.param], flags)
    train(assets, folder / "plain", PROCESSES[request.param])
    return folder / "watched", watched, folder / "plain"


def train(assets, output, environment, flags=None):
    """Train by the command line, with MIR if there are flags for the launcher."""
    recipe = output.with_suffix(".yaml")
    settings = {
        **{"model_name_or_path": str(assets / "model"), "template": "llava", "cutoff_len": 256},
        **{"dataset": "scenes", "dataset_dir": str(assets / "data"), "media_dir": str(assets / "data")},
        **{"stage": "sft", "do_train": True, "finetuning_type": "full", "output_dir": str(output)},
        **{"max_steps": STEPS, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-3},
        **{"use_cpu": True, "report_to": "none", "overwrite_cache": True},
    }
    recipe.write_text(json.dumps(settings))  # YAML too
    launcher = [] if flags is None else ["-m", "mir_callback.launch", *flags, "--"]
    command = [str(PYTHON.with_name("llamafactory-cli")), "train", str(recipe)]
    path = f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}"
    done = run_process([*launcher, *command], python=PYTHON, environment={**environment, "PATH": path})
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout + done.stderr


def test_every_evaluation_has_its_line_and_none_is_missed(runs):
    folder, output, _ = runs
    assert [record.step for record in read_history(folder / "mir_history.jsonl")] == [0, 2, 4]
    assert [output.count(f"[mir] step {step}: MIR") for step in (0, 2, 4)] == [1, 1, 1]
    assert "no MIR was measured" not in output


def test_losses_and_weights_are_those_of_a_run_without_mir(runs):
    watched, _, plain = runs
    assert rows(watched) == rows(plain)
    assert sum("loss" in row for row in rows(plain)) == STEPS
    assert digest(load_file(watched / "model.safetensors")) == digest(load_file(plain / "model.safetensors"))


def rows(folder):
    """What the Trainer has logged, without MIR's rows and what depends on time."""
    logged = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    return [{key: row[key] for key in row if key not in timed} for row in logged if "mir" not in row]


def test_values_are_those_of_the_weights(runs, assets):
    folder, _, _ = runs
    first, *_, last = read_history(folder / "mir_history.jsonl")
    probe = Probe.load(assets / "probe.zip")
    for record, weights in ((first, assets / "model"), (last, folder)):
        model, processor = tiny_models.llava()
        model = type(model).from_pretrained(weights)
        assert evaluate_mir(model, probe, processor=processor).mir == pytest.approx(record.mir, abs=1e-8)
