# SPDX-License-Identifier: Apache-2.0
"""Runs that were stopped, killed or moved, and go on: real Trainers, real checkpoints."""

import json
import math
import shutil

import pytest
import wandb
from transformers import TrainerCallback

from mir_callback import MIRCallback, PlateauRule, Probe, Verdict
from mir_callback.errors import ConfigError, HistoryError
from mir_callback.record import EvalRecord, changed_circumstances, since_last_stop
from tests.logs import logged
from tests.samples import pairs
from tests.training import wandb_file
from tests.training.runs import losses, make_trainer

SAVE = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def probe():
    return Probe.from_pairs(pairs(4))


class Level:
    """A rule that finds the third evaluation it is given level."""

    def verdict(self, history):
        return Verdict("plateau" if len(history) >= 3 else "going on", f"{len(history)} evaluations")


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory, probe):
    """A run of 20 steps that its rule stopped at step 4, with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    trainer = make_trainer(folder, steps=20, **SAVE)
    MIRCallback(probe, every=2, stop=Level()).attach(trainer)
    trainer.train()
    assert trainer.state.global_step == 4
    return folder


def resume(source, folder, probe, step, steps=20, rule=None, **options):
    shutil.copytree(source, folder)
    trainer = make_trainer(folder, steps=steps, **SAVE)
    callback = MIRCallback(probe, every=2, stop=rule, **options).attach(trainer)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    return trainer, callback


def verdicts(callback):
    return [(record.step, record.verdict) for record in callback.history]


def test_a_run_stopped_on_its_plateau_stays_stopped(stopped_run, tmp_path, probe, capsys):
    trainer, callback = resume(stopped_run, tmp_path / "run", probe, 4, rule=Level())
    # A Trainer first asks after a micro-batch: two make a step here, so none is taken; without accumulation, one is.
    assert trainer.state.global_step == 4
    assert verdicts(callback) == [(0, "going on"), (2, "going on"), (4, "plateau")]
    said = capsys.readouterr().out
    assert "this run was stopped on its plateau at step 4 (3 evaluations) and stays stopped" in said
    assert "continue_after_stop=True" in said
    assert (tmp_path / "run" / "mir_history.jsonl").read_text().count("\n") == 3


def test_a_stopped_run_goes_on_when_told_and_its_rule_starts_anew(stopped_run, tmp_path, probe):
    trainer, callback = resume(stopped_run, tmp_path / "run", probe, 4, rule=Level(), continue_after_stop=True)
    assert trainer.state.global_step == 10
    assert verdicts(callback)[2:] == [(4, "plateau"), (6, "going on"), (8, "going on"), (10, "plateau")]


def test_without_a_rule_a_stopped_run_goes_on(stopped_run, tmp_path, probe):
    trainer, _ = resume(stopped_run, tmp_path / "run", probe, 4, steps=6)
    assert trainer.state.global_step == 6


def test_a_rule_that_only_observes_does_not_hold_a_stopped_run(stopped_run, tmp_path, probe, capsys):
    rule = PlateauRule(window=4, warmup=0, min_delta=100, horizon=2, observe_only=True)
    trainer, callback = resume(stopped_run, tmp_path / "run", probe, 4, steps=14, rule=rule)
    assert trainer.state.global_step == 14
    assert "stays stopped" not in capsys.readouterr().out
    records = callback.history
    assert [record.step for record in records] == [0, 2, 4, 6, 8, 10, 12, 14]
    # It judges what came after the stop, and would have stopped once more.
    assert [record.would_stop for record in records[3:]] == [False, False, False, True, True]
    assert {record.verdict for record in records[3:]} <= {"no data", "going on"}


def test_resumed_from_before_its_stop_a_run_comes_to_the_same_stop(stopped_run, tmp_path, probe):
    trainer, callback = resume(stopped_run, tmp_path / "run", probe, 2, rule=Level())
    assert trainer.state.global_step == 4
    assert verdicts(callback) == [(0, "going on"), (2, "going on"), (4, "plateau")]
    aside = (tmp_path / "run" / "mir_history.1.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in aside] == [0, 2, 4]


def test_resumes_from_a_checkpoint_made_without_the_callback(tmp_path, probe):
    plain = make_trainer(tmp_path, steps=4, **SAVE)
    plain.train()
    trainer = make_trainer(tmp_path, steps=6, **SAVE)
    callback = MIRCallback(probe, every=2, stop=Level(), keep_best=True).attach(trainer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [record.step for record in callback.history] == [2, 4, 6]


def test_error_leaves_everything_alone_when_the_run_is_resumed_with_another_probe(stopped_run, tmp_path, probe):
    other = Probe.from_pairs(pairs(4, seed=1))
    with pytest.raises(HistoryError, match="probe_fingerprint"):
        resume(stopped_run, tmp_path / "run", other, 4)
    assert (tmp_path / "run" / "mir_history.jsonl").read_bytes() == (stopped_run / "mir_history.jsonl").read_bytes()
    with pytest.raises(HistoryError, match="root.*paper_fast"):
        resume(stopped_run, tmp_path / "again", probe, 4, root="paper_fast")
    with pytest.raises(HistoryError, match="prompt: it was '{image}{text}' .* is '{image} {text}' now"):
        resume(stopped_run, tmp_path / "prompt", probe, 4, prompt="{image} {text}")


def test_other_image_processor_settings_are_said_once_and_not_refused(stopped_run, tmp_path, probe):
    folder = tmp_path / "run"
    shutil.copytree(stopped_run, folder)
    trainer = make_trainer(folder, steps=8, **SAVE)
    trainer.processing_class.image_processor.image_mean = [0.1, 0.2, 0.3]
    callback = MIRCallback(probe, every=2).attach(trainer)
    with logged("step 6: the conditions of the measurement have changed") as messages:
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    (message,) = messages
    assert "pixel inputs (settings of the image processor" in message
    assert "dtype" not in message
    assert callback.history[-1].tokens_fingerprint == callback.history[0].tokens_fingerprint


def test_nothing_is_said_when_nothing_changed(stopped_run, tmp_path, probe):
    with logged():
        _, callback = resume(stopped_run, tmp_path / "run", probe, 4, steps=6)
    assert len({record.pixels_fingerprint for record in callback.history}) == 1


def test_changed_circumstances_are_named_with_both_values():
    earlier = [EvalRecord(step=0, dtype="float32", world_size=8), EvalRecord(step=50)]
    told = changed_circumstances(earlier, EvalRecord(step=60, dtype="bfloat16", world_size=4))
    assert "dtype of the hidden states: float32 up to step 0, now bfloat16" in told
    assert "number of ranks: 8 up to step 0, now 4" in told
    assert changed_circumstances(earlier, EvalRecord(step=60, dtype="float32")) is None
    assert changed_circumstances([], EvalRecord(step=60, dtype="float32")) is None


def test_a_rule_judges_what_came_after_the_last_stop():
    records = [
        EvalRecord(step=step, verdict=verdict) for step, verdict in enumerate(["going on", "plateau", None, None])
    ]
    assert [record.step for record in since_last_stop(records)] == [2, 3]
    assert since_last_stop(records[:1]) == records[:1]


def test_the_wandb_run_continues_and_no_step_is_there_twice(tmp_path, probe, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_RUN_ID", "mirrun01")
    monkeypatch.setenv("WANDB_RESUME", "allow")
    found, expected = [], []
    for number, checkpoint in enumerate((None, 4)):
        folder = tmp_path / f"wandb{number}"
        folder.mkdir()
        monkeypatch.setenv("WANDB_DIR", str(folder))
        trainer = make_trainer(tmp_path / "run", steps=4 if checkpoint is None else 8, report_to=["wandb"], **SAVE)
        callback = MIRCallback(probe, every=2).attach(trainer)
        trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / "run" / f"checkpoint-{checkpoint}"))
        wandb.finish()
        wandb.teardown()  # another process, as far as wandb is concerned
        found += [row for row in wandb_file.rows(folder) if "train/mir" in row]
        expected = [(record.step, record.mir) for record in callback.history]
        assert [path.name.split("-")[-1] for path in folder.glob("wandb/offline-run-*")] == ["mirrun01"]
    assert [(row["train/global_step"], row["train/mir"]) for row in found] == expected
    assert [step for step, _ in expected] == [0, 2, 4, 6, 8]


def test_error_before_the_first_step_when_a_trainer_has_two_callbacks(tmp_path, probe):
    trainer = make_trainer(tmp_path)
    for samples in (probe, Probe.from_pairs(pairs(5))):
        trainer.add_callback(MIRCallback(samples))
    with pytest.raises(ConfigError, match="MIRCallback"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not list(tmp_path.glob("mir_history.*.jsonl"))


def test_one_callback_serves_several_runs_of_its_trainer(tmp_path, probe):
    trainer = make_trainer(tmp_path, steps=1)
    callback = MIRCallback(probe, keep_best=True).attach(trainer)
    trainer.train()
    trainer.train()
    assert [record.step for record in callback.history] == [0, 1]


def choosing(folder, probe, *, every, metric="mir", **options):
    """A Trainer that evaluates, saves and chooses by MIR, whose lowest is in the middle of the run."""
    trainer = make_trainer(
        folder,
        steps=6,
        evaluated=4,
        metric_for_best_model=metric,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        **options,
    )
    return trainer, MIRCallback(probe, every=every).attach(trainer)


@pytest.mark.parametrize("every", [1, 50])
def test_the_trainer_chooses_its_best_checkpoint_by_mir(tmp_path, probe, every):
    trainer, callback = choosing(tmp_path, probe, every=every, greater_is_better=False)
    trainer.train()
    values = {record.step: record.mir for record in callback.history}
    best = min((2, 4, 6), key=values.__getitem__)
    assert trainer.state.best_metric == values[best]
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    # The weights loaded at the end belong to another step; nothing of them is written under the last one.
    assert list(values) == ([0, 1, 2, 3, 4, 5, 6] if every == 1 else [0, 2, 4, 6])
    assert len(losses(trainer)) == 6


class Elsewhere(TrainerCallback):
    """Ends the run after its callbacks have seen the step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step == 3


def test_loaded_weights_are_not_measured_as_the_last_step(tmp_path, probe):
    trainer, callback = choosing(tmp_path, probe, every=2, metric="eval_mir", greater_is_better=False)
    trainer.add_callback(Elsewhere())
    trainer.train()
    assert trainer.state.global_step == 3
    assert [record.step for record in callback.history] == [0, 2]


def test_error_when_transformers_would_take_the_highest_mir_for_the_best(tmp_path, probe):
    trainer, _ = choosing(tmp_path, probe, every=2)
    with pytest.raises(ConfigError, match="greater_is_better"):
        trainer.train()


def test_eval_mir_is_among_the_metrics_only_where_it_was_measured(tmp_path, probe):
    trainer = make_trainer(tmp_path, steps=4, evaluated=4, eval_strategy="steps", eval_steps=1)
    seen = {}

    class Reader(TrainerCallback):
        """What an early-stopping callback added after ours would see."""

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen[state.global_step] = metrics.get("eval_mir")

    callback = MIRCallback(probe, every=2).attach(trainer)
    trainer.add_callback(Reader())
    trainer.train()
    values = {record.step: record.mir for record in callback.history}
    assert seen == {1: None, 2: values[2], 3: None, 4: values[4]}
    assert all(math.isfinite(value) for value in values.values())
    assert "eval_mir" not in trainer.evaluate()  # after training: whose weights these are is not known here
