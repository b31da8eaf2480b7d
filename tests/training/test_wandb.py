# SPDX-License-Identifier: Apache-2.0
"""What a real (offline) wandb run holds afterwards, read back from its file."""

import json
import re
from pathlib import Path

import pytest
import wandb

from mir_callback import MIRCallback, PlateauRule, Probe
from tests.samples import pairs
from tests.training import wandb_file
from tests.training.runs import losses, make_trainer


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
        record.step: record.mir for record in callback.history
    }
    assert sorted(mir) == [0, 1, 2, 3]
    for record in callback.history:
        row = mir[record.step]
        assert [row[f"train/mir_layer/{k:02d}"] for k in (1, 2, 3)] == record.per_layer
        assert row["train/mir_seconds"] == record.seconds
    logged = {row["train/global_step"]: row["train/loss"] for row in found if "train/loss" in row}
    assert logged == dict(losses(trainer))
    assert sorted(logged) == [1, 2, 3]


def test_one_row_a_step_holds_values_chart_and_heat_map(tmp_path, wandb_folder):
    trainer = make_trainer(tmp_path / "run", steps=4, report_to=["wandb"])
    callback = MIRCallback(Probe.from_pairs(pairs(4)), every=2).attach(trainer)
    trainer.train()
    wandb.finish()
    found = wandb_file.rows(wandb_folder)
    ours = [row for row in found if any("mir" in name for name in row)]
    assert [row["train/global_step"] for row in ours] == [0, 2, 4]
    steps = [row["train/global_step"] for row in found]
    assert steps == sorted(steps)
    assert wandb_file.axes(wandb_folder)["*"] == "train/global_step"
    for row, record in zip(ours, callback.history, strict=True):
        assert row["mir/layers_over_steps/values"] == record.per_layer  # a heat map, layer x step
        assert row["mir/layers_over_steps/bins"] == [0.5, 1.5, 2.5, 3.5]
        (folder,) = wandb_folder.glob("wandb/offline-run-*")
        table = json.loads((folder / "files" / row["mir/per_layer_table/path"]).read_text())
        drawn = [value for _, line, value in table["data"] if line == f"step {record['step']}"]
        assert drawn == record.per_layer
    assert any("visualize/mir/per_layer" in name for name in wandb_file.settings(wandb_folder))


def test_run_settings_and_summary_say_how_and_how_well(tmp_path, wandb_folder):
    probe = Probe.from_pairs(pairs(4))
    trainer = make_trainer(tmp_path / "run", steps=3, report_to=["wandb"])
    callback = MIRCallback(probe, every=1, stop=PlateauRule(warmup=7)).attach(trainer)
    trainer.train()
    wandb.finish()
    first = callback.history[0]
    settings = wandb_file.settings(wandb_folder)
    ours = {name.removeprefix("mir/"): value for name, value in settings.items() if name.startswith("mir/")}
    ours = ours or settings["mir"]
    assert ours["probe_fingerprint"] == probe.fingerprint
    assert ours["every"] == "EverySteps(steps=1)"
    assert ours["also_on"] == "start, end"
    assert "warmup=7" in ours["stop"]
    for name in ("tokens_fingerprint", "root", "dtype", "num_vision_tokens", "world_size"):
        assert ours[name] == first[name]
    best = min(callback.history, key=lambda record: record.mir)
    summary = wandb_file.summary(wandb_folder)
    assert (summary["mir_best"], summary["mir_best_step"]) == (best.mir, best.step)
    assert (summary["train/mir_best"], summary["train/mir_best_step"]) == (best.mir, best.step)
    assert summary["train/mir"] == callback.history[-1].mir
    updates = [r for r in wandb_file.finished(wandb_folder) if "tokens_fingerprint" in str(r.config)]
    assert len(updates) == 1  # once, not with every evaluation


def test_values_reach_a_run_that_the_trainer_does_not_report_to(tmp_path, wandb_folder):
    trainer = make_trainer(tmp_path / "run", steps=2)
    callback = MIRCallback(Probe.from_pairs(pairs(4)), every=2).attach(trainer)
    wandb.init()
    trainer.train()
    wandb.finish()
    found = wandb_file.rows(wandb_folder)
    assert [(row["train/global_step"], row["train/mir"]) for row in found] == [
        (record.step, record.mir) for record in callback.history
    ]
    assert all("mir/layers_over_steps/values" in row for row in found)
    assert wandb_file.axes(wandb_folder)["train/mir*"] == "train/global_step"


def test_panel_set_names_every_key_of_ours_when_a_run_has_logged_them(tmp_path, wandb_folder):
    trainer = make_trainer(tmp_path / "run", steps=1, report_to=["wandb"])
    MIRCallback(Probe.from_pairs(pairs(4), matched=True), every=1, vision_gain=True).attach(trainer)
    trainer.train()
    wandb.finish()
    page = (Path(__file__).parents[2] / "docs" / "logging.md").read_text(encoding="utf-8")
    values, view = page.partition("## A wandb view")[::2]
    keys = {key for row in wandb_file.rows(wandb_folder) for key in row} | set(wandb_file.summary(wandb_folder))
    logged = {re.sub("/(values|bins|_type)$|_table/.*$", "", key) for key in keys}
    panels = set(re.findall(r"`((?:train|mir)/[^` ]+)`", view))
    assert panels <= logged
    explained = set(re.findall(r"`(mir[^` .]*)`", values))
    assert {key.removeprefix("train/") for key in logged if re.match("train/mir(?!_layer/0[2-9])", key)} <= explained
