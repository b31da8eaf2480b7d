# SPDX-License-Identifier: Apache-2.0
"""What a real (offline) wandb run holds afterwards, read back from its file."""

import pytest
import wandb

from mir_callback import MIRCallback, Probe
from tests.samples import pairs
from tests.training import wandb_file
from tests.training.runs import losses, make_trainer


@pytest.fixture
def wandb_folder(tmp_path, monkeypatch):
    folder = tmp_path / "wandb-run"
    folder.mkdir()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(folder))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield folder
    wandb.teardown()


@pytest.mark.parametrize("attached", [True, False])
def test_mir_stands_at_its_own_step_beside_every_loss(tmp_path, wandb_folder, attached):
    trainer = make_trainer(tmp_path / "run", steps=3, report_to=["wandb"])
    callback = MIRCallback(Probe.from_pairs(pairs(4)), every=1)
    if attached:
        callback.attach(trainer)
    else:
        trainer.add_callback(callback)
    trainer.train()
    wandb.finish()
    found = wandb_file.rows(wandb_folder)
    mir = {row["train/global_step"]: row for row in found if "train/mir" in row}
    assert {step: row["train/mir"] for step, row in mir.items()} == {
        record["step"]: record["mir"] for record in callback.history
    }
    assert sorted(mir) == [0, 1, 2, 3]
    for record in callback.history:
        row = mir[record["step"]]
        assert [row[f"train/mir_layer/{k:02d}"] for k in (1, 2, 3)] == record["per_layer"]
        assert row["train/mir_seconds"] == record["seconds"]
    logged = {row["train/global_step"]: row["train/loss"] for row in found if "train/loss" in row}
    assert logged == dict(losses(trainer))
    assert sorted(logged) == [1, 2, 3]
