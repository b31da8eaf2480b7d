# SPDX-License-Identifier: Apache-2.0
"""Reporters that fail, trackers that are gone, and a clock that jumps."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import wandb
from transformers import TrainerCallback

from mir_callback import MIRCallback, Probe
from tests.faults.runs import run_broken
from tests.faults.train_worker import FAULT_STEP, STEPS
from tests.logs import logged
from tests.samples import pairs
from tests.training.runs import losses, make_trainer

pytestmark = pytest.mark.faults


def test_training_goes_on_and_one_warning_is_given_when_a_reporter_fails_on_one_rank(tmp_path):
    run = run_broken(tmp_path, "reporter")
    assert run.code == 0
    for rank in run.ranks:
        assert (rank["error"], rank["step"]) == (None, STEPS)
    assert run.ranks[1]["warnings"] == []
    (warning,) = run.ranks[0]["warnings"]
    assert "ConnectionError: the tracking server is gone" in warning
    assert run.steps == [0, 2, 4, 6, 8]
    assert len(run.ranks[0]["losses"]) == STEPS


class KillService(TrainerCallback):
    """Ends wandb's own process in the middle of the run."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            for child in children:
                if "wandb-core" in Path(f"/proc/{child}/cmdline").read_text():
                    os.kill(int(child), signal.SIGKILL)


def test_history_is_complete_when_the_process_of_wandb_dies(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    # The Trainer's own reporting of losses would end training by itself: only MIR is reported here.
    trainer = make_trainer(tmp_path / "run", steps=4)
    monkeypatch.setattr(wandb, "run", wandb.init(project="faults"))  # gone after the test, as its process is
    callback = MIRCallback(Probe.from_pairs(pairs(4)), every=1)
    trainer.add_callback(callback)
    trainer.add_callback(KillService())
    with logged("wandb") as messages:
        trainer.train()
    assert len([message for message in messages if "wandb" in message]) == 1
    assert [record.step for record in callback.history] == [0, 1, 2, 3, 4]
    assert len(losses(trainer)) == 4


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_durations_are_right_when_the_clock_jumps_a_day_back(tmp_path):
    library = tmp_path / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    environment = {"LD_PRELOAD": str(library), "MIR_TEST_CLOCK_BACK": str(tmp_path / "back")}
    run = run_broken(tmp_path, "clock", environment=environment, watchdog_seconds=60)
    assert run.code == 0
    assert run.steps == [0, 2, 4, 6, 8]
    at = {record.step: record for record in run.records}
    assert at[FAULT_STEP]["time"] < at[0]["time"] - 80_000  # it did jump
    assert all(0 < record.seconds < 60 for record in run.records)
    elapsed = [record.elapsed for record in run.records]
    assert elapsed == sorted(elapsed)
    assert "STUCK" not in run.output
