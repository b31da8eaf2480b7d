# SPDX-License-Identifier: Apache-2.0
"""Commands that start processes of their own, under the launcher: the Trainer in those processes is measured."""

import json
import math
import os
import sys
from pathlib import Path

import pytest

from mir_callback import Probe
from mir_callback.history import read_history
from tests.distributed.launch import run_process
from tests.loops.running import example
from tests.samples import pairs

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
SCRIPT = """
import sys
from tests.training.runs import make_trainer
make_trainer(sys.argv[-1], steps=4).train()
"""
COMMANDS = {
    "accelerate": ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "SCRIPT"],  # on CPUs it takes MPI
    "torchrun": ["torchrun", "--standalone", "--nproc_per_node", "2", "SCRIPT"],
    "deepspeed": ["deepspeed", "--no_local_rank", "--num_gpus", "2", "SCRIPT"],
    "a module": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "SCRIPT"],
}


def launch(folder, command):
    """Run a command with MIR; what it printed."""
    probe = str(Probe.from_pairs(pairs(5)).save(folder / "probe.zip"))
    flags = ["--mir_probe", probe, "--mir_every", "2"]
    path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = run_process(["-m", "mir_callback.launch", *flags, "--", *command], environment=path)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_two_processes_of_a_command_are_measured_as_one_run(tmp_path, name):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    command = [str(script) if word == "SCRIPT" else word for word in COMMANDS[name]]
    check(tmp_path / "run", launch(tmp_path, [*command, str(tmp_path / "run")]))


def test_trl_is_measured(tmp_path):
    model, processor = example("tiny_llava.untrained").make_model()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    example("trl_sft").conversations(16).to_parquet(tmp_path / "data" / "train.parquet")
    settings = {
        **{"model_name_or_path": str(tmp_path / "model"), "dataset_name": str(tmp_path / "data")},
        **{"output_dir": str(tmp_path / "run"), "max_steps": 4, "per_device_train_batch_size": 2, "report_to": "none"},
        **{"max_length": None, "bf16": False, "use_cpu": True, "save_strategy": "no", "logging_steps": 1},
        **{"dtype": "float32"},
    }
    (tmp_path / "sft.yaml").write_text(json.dumps(settings))  # YAML too
    command = ["trl", "sft", "--config", str(tmp_path / "sft.yaml"), "--multi_gpu", "--num_processes", "2"]
    check(tmp_path / "run", launch(tmp_path, command))


def check(run, output):
    records = read_history(run / "mir_history.jsonl")
    assert [record.step for record in records] == [0, 2, 4]
    assert all(math.isfinite(record.mir) and record.world_size == 2 for record in records)
    assert [output.count(f"[mir] step {step}: MIR") for step in (0, 2, 4)] == [1, 1, 1]  # of rank 0
    assert "no MIR was measured" not in output
