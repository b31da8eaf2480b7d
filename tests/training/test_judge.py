# SPDX-License-Identifier: Apache-2.0
"""Verdicts in real runs: what records keep of them, observing only, stages, and who is alerted when."""

import pytest
import torch
import wandb
from transformers import TrainerCallback

from mir_callback import MIRCallback, MIRMonitor, PlateauRule, Probe, Verdict
from mir_callback.history import read_history
from mir_callback.loggers import due_alerts
from mir_callback.monitor import verdict_fields
from mir_callback.record import EvalRecord
from tests import tiny_models
from tests.logs import logged
from tests.samples import pairs
from tests.training import wandb_file
from tests.training.runs import make_trainer

SETTLED = {"learning_rate": 0.0}  # MIR does not move
QUICK = {"window": 4, "warmup": 0, "horizon": None}


@pytest.fixture(scope="module")
def probe():
    return Probe.from_pairs(pairs(4))


class Script:
    """A rule that says what it is told to, evaluation by evaluation."""

    def __init__(self, *kinds):
        self.kinds = kinds

    def verdict(self, history):
        return Verdict(self.kinds[len(history) - 1], f"because of evaluation {len(history)}")


def test_records_keep_the_verdict_its_figures_and_what_it_was_based_on(tmp_path, probe, capsys):
    trainer = make_trainer(tmp_path, steps=8, **SETTLED)
    callback = MIRCallback(probe, every=1, stop=PlateauRule(**QUICK)).attach(trainer)
    trainer.train()
    assert trainer.state.global_step == 3
    assert [record.verdict for record in callback.history] == ["no data"] * 3 + ["plateau"]
    last = callback.history[-1]
    assert last.would_stop is True
    assert last.expected_gain == pytest.approx(0, abs=1e-9)
    assert last.expected_gain_se == pytest.approx(0, abs=1e-9)
    assert {record.max_steps for record in callback.history} == {8}
    assert len({record.stage for record in callback.history}) == 1
    assert read_history(tmp_path / "mir_history.jsonl") == callback.history
    logged = [entry for entry in trainer.state.log_history if "mir_expected_gain" in entry]
    assert [(entry["step"], entry["mir_expected_gain"]) for entry in logged] == [(3, last.expected_gain)]
    said = capsys.readouterr().out
    assert "plateau: stopping" in said
    assert "waiting (3 of 4)" in said


def test_observing_changes_no_step_and_a_resumed_run_goes_on(tmp_path, probe, capsys):
    options = {"save_strategy": "steps", "save_steps": 5, **SETTLED}
    trainer = make_trainer(tmp_path, steps=5, **options)
    rule = PlateauRule(**QUICK, observe_only=True)
    callback = MIRCallback(probe, every=1, stop=rule).attach(trainer)
    trainer.train()
    assert trainer.state.global_step == 5
    assert [record.verdict for record in callback.history] == ["no data"] * 3 + ["going on"] * 3
    assert [record.would_stop for record in callback.history] == [False] * 3 + [True] * 3
    assert callback.history[3].reason.startswith("would stop, but only observes: in the next")
    assert "plateau: observing only" in capsys.readouterr().out
    trainer = make_trainer(tmp_path, steps=7, **options)
    again = MIRCallback(probe, every=1, stop=rule).attach(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 7
    assert [record.step for record in again.history] == list(range(8))


def test_a_run_in_two_parts_gets_the_verdicts_of_one_in_one_go(tmp_path, probe):
    options = {"save_strategy": "steps", "save_steps": 3, **SETTLED}

    def verdicts(folder, **train):
        trainer = make_trainer(folder, steps=6, **options)
        callback = MIRCallback(probe, every=1, stop=PlateauRule(**QUICK, patience=2, observe_only=True)).attach(trainer)
        trainer.train(**train)
        names = ("step", "verdict", "reason", "would_stop", "stage", "max_steps", "expected_gain")
        return [{name: record[name] for name in names} for record in callback.history]

    whole = verdicts(tmp_path / "run")
    resumed = verdicts(tmp_path / "run", resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert resumed == whole
    assert whole[-1]["would_stop"]


def test_the_rule_waits_for_the_last_epoch(tmp_path, probe, capsys):
    trainer = make_trainer(tmp_path, steps=40, **SETTLED)  # of 16 steps an epoch
    callback = MIRCallback(probe, every=2, stop=PlateauRule(**QUICK)).attach(trainer)
    trainer.train()
    assert trainer.state.global_step == 40
    assert [record.next_epoch for record in callback.history] == [16] * 9 + [32] * 8 + [None] * 4
    assert [record.verdict for record in callback.history[-4:]] == ["no data"] * 3 + ["plateau"]
    assert callback.history[8].reason.endswith("but an epoch begins at step 16")
    said = capsys.readouterr().out
    assert "the stop rule waits for step 32" in said
    assert "level, waits for step 32" in said


def test_records_name_the_next_drop_of_the_learning_rate(tmp_path, probe):
    model, processor = tiny_models.llava()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [300, 600])
    plan = {"optimizer": optimizer, "lr_scheduler": scheduler, "total_steps": 900, "output_dir": tmp_path}
    monitor = MIRMonitor(model, probe, processor=processor, every=300, **plan)
    for step in range(1, 901):
        monitor.step(step)
    monitor.close()
    assert [record.next_drop for record in monitor.history] == [300, 300, 600, None]
    resumed = MIRMonitor(model, probe, processor=processor, every=300, start_step=600, **plan)
    assert [record.next_drop for record in resumed.history] == [300, 300, 600]


class Unfreeze(TrainerCallback):
    """Trains the language model as well from a step on, as a second stage does."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.model.language_model.requires_grad_(True)


def test_training_other_parameters_begins_a_new_stage(tmp_path, probe):
    trainer = make_trainer(tmp_path, steps=6, **SETTLED)
    trainer.model.requires_grad_(False)
    trainer.model.model.multi_modal_projector.requires_grad_(True)
    trainer.add_callback(Unfreeze(3))
    callback = MIRCallback(probe, every=1, stop=PlateauRule(**QUICK, observe_only=True)).attach(trainer)
    trainer.train()
    first, second = callback.history[0].stage, callback.history[-1].stage
    assert first != second
    assert [record.stage for record in callback.history] == [first] * 4 + [second] * 3
    assert [record.would_stop for record in callback.history] == [False] * 3 + [True] + [False] * 3
    assert callback.history[-1].reason == "3 of 4 evaluations in the window, after 0 of warm-up"


def test_no_rule_no_verdict(tmp_path, probe):
    trainer = make_trainer(tmp_path, steps=1)
    callback = MIRCallback(probe, every=1).attach(trainer)
    trainer.train()
    assert [record.verdict for record in callback.history] == [None, None]
    assert callback.history[0].would_stop is None
    assert callback.history[0].max_steps == 1


def test_wandb_is_alerted_once_on_the_plateau_and_has_the_reason(tmp_path, probe, wandb_folder):
    trainer = make_trainer(tmp_path / "run", steps=8, report_to=["wandb"], **SETTLED)
    callback = MIRCallback(probe, every=1, stop=PlateauRule(**QUICK)).attach(trainer)
    trainer.train()
    wandb.finish()
    (alert,) = wandb_file.alerts(wandb_folder)
    last = callback.history[-1]
    assert alert.title == "MIR has reached its plateau: training stops"
    assert alert.text == f"step 3, MIR {last['mir']:.4f}: {last['reason']}"
    assert alert.level == "INFO"
    summary = wandb_file.summary(wandb_folder)
    assert (summary["mir_verdict"], summary["mir_reason"]) == ("plateau", last.reason)
    assert summary["train/mir_expected_gain"] == last.expected_gain


def test_wandb_is_alerted_once_when_the_rule_only_observes(tmp_path, probe, wandb_folder):
    trainer = make_trainer(tmp_path / "run", steps=6, report_to=["wandb"], **SETTLED)
    MIRCallback(probe, every=1, stop=PlateauRule(**QUICK, observe_only=True)).attach(trainer)
    trainer.train()
    wandb.finish()
    (alert,) = wandb_file.alerts(wandb_folder)
    assert alert.title == "MIR has reached its plateau"
    assert alert.text.startswith("step 3, MIR ")


def test_wandb_is_alerted_when_mir_rises_and_again_after_it_had_recovered(tmp_path, probe, wandb_folder):
    kinds = ("no data", "rising", "too noisy", "rising", "going on", "rising", "rising")
    trainer = make_trainer(tmp_path / "run", steps=6, report_to=["wandb"])
    MIRCallback(probe, every=1, stop=Script(*kinds)).attach(trainer)
    trainer.train()
    wandb.finish()
    found = [(alert.title, alert.text.split(",")[0], alert.level) for alert in wandb_file.alerts(wandb_folder)]
    assert found == [("MIR is rising", "step 1", "WARN"), ("MIR is rising", "step 5", "WARN")]


def test_an_alert_that_fails_ends_nothing(tmp_path, probe, wandb_folder, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("no alerts today")

    trainer = make_trainer(tmp_path / "run", steps=4, report_to=["wandb"])
    callback = MIRCallback(probe, every=1, stop=Script(*["rising", "going on"] * 3)).attach(trainer)
    wandb.init()
    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "alert", refuse)
    with logged("wandb alerts.*no alerts today"):
        trainer.train()
    wandb.finish()
    assert [record.step for record in callback.history] == [0, 1, 2, 3, 4]
    assert len([row for row in wandb_file.rows(wandb_folder) if "train/mir" in row]) == 5


def alerts_of(*verdicts, stages=None):
    """The alerts, each with the number of its evaluation and its title."""
    records = [
        EvalRecord(step=number, mir=2.0, stage=(stages or "a" * len(verdicts))[number], **verdict_fields(verdict))
        for number, verdict in enumerate(verdicts)
    ]
    found = [(number, due_alerts(records[:number], record)) for number, record in enumerate(records)]
    return [(number, alert.title) for number, alerts in found for alert in alerts]


def test_alerts_are_known_from_the_records_alone():
    rising, going, noisy = (Verdict(kind, "") for kind in ("rising", "going on", "too noisy"))
    observed, plateau = Verdict("plateau", "", observed=True), Verdict("plateau", "")
    assert alerts_of(rising, rising, noisy, rising) == [(0, "MIR is rising")]
    assert alerts_of(rising, going, rising, observed, rising) == [
        (0, "MIR is rising"),
        (2, "MIR is rising"),
        (3, "MIR has reached its plateau"),
        (4, "MIR is rising"),
    ]
    assert alerts_of(observed, going, observed) == [(0, "MIR has reached its plateau")]
    assert alerts_of(going, plateau) == [(1, "MIR has reached its plateau: training stops")]
    assert [number for number, _ in alerts_of(rising, rising, observed, observed, stages="abab")] == [0, 1, 2, 3]
    assert alerts_of(None, going, noisy) == []
