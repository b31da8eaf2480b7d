# SPDX-License-Identifier: Apache-2.0
"""Evaluations whose solves go on beside training."""

import threading

import pytest
from transformers import TrainerCallback

from mir_callback import MIRCallback, PlateauRule, Probe
from mir_callback.engine import distances
from mir_callback.errors import ConfigError, NumericsError
from mir_callback.training.history import read_history
from tests.samples import pairs
from tests.training.runs import losses, make_trainer

STEPS = 6


@pytest.fixture(scope="module")
def probe():
    return Probe.from_pairs(pairs(6))


def train(folder, probe, steps=STEPS, train_options=None, **options):
    trainer = make_trainer(folder, steps=steps, **(train_options or {}))
    callback = MIRCallback(probe, every=2, **options).attach(trainer)
    trainer.train()
    return trainer, callback


class Held:
    """Solves wait until they may go on, so that a test decides when a value is ready."""

    def __init__(self, monkeypatch):
        self.gate = threading.Event()
        solve = distances.transport_maps

        def held(*arguments):
            assert self.gate.wait(60)
            return solve(*arguments)

        monkeypatch.setattr(distances, "transport_maps", held)


def test_values_and_training_are_those_of_waiting(tmp_path, probe):
    waiting, now = train(tmp_path / "now", probe)
    other, beside = train(tmp_path / "beside", probe, solve="background")
    assert losses(other) == losses(waiting)
    assert [record["step"] for record in beside.history] == [0, 2, 4, 6]
    for ours, theirs in zip(beside.history, now.history, strict=True):
        assert ours["mir"] == theirs["mir"]
        assert ours["influences"] == theirs["influences"]
        assert ours["epoch"] == theirs["epoch"]
        assert ours["wall_seconds"] >= 0
    assert read_history(tmp_path / "beside" / "mir_history.jsonl") == beside.history


def test_late_value_is_logged_under_its_own_step(tmp_path, probe, monkeypatch):
    held = Held(monkeypatch)

    class Release(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                assert callback.history == []  # that of step 0 is still under way
                held.gate.set()

    trainer = make_trainer(tmp_path, steps=STEPS)
    callback = MIRCallback(probe, every=3, solve="background").attach(trainer)
    trainer.add_callback(Release())
    trainer.train()
    logged = [(entry["step"], entry["mir"]) for entry in trainer.state.log_history if "mir" in entry]
    assert logged == [(record["step"], record["mir"]) for record in callback.history]
    assert [step for step, _ in logged] == [0, 3, 6]
    assert trainer.state.global_step == STEPS


def test_value_is_in_the_history_before_its_checkpoint_is_saved(tmp_path, probe, monkeypatch):
    held = Held(monkeypatch)
    held.gate.set()
    seen = {}

    class Saved(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen[state.global_step] = [record["step"] for record in read_history(tmp_path / "mir_history.jsonl")]

    trainer = make_trainer(tmp_path, steps=4, save_strategy="steps", save_steps=1)
    MIRCallback(probe, every=1, solve="background").attach(trainer)
    trainer.add_callback(Saved())
    trainer.train()
    assert set(seen) == {1, 2, 3, 4}
    for step, known in seen.items():
        assert known == list(range(step + 1))


def test_rule_stops_the_run_when_the_value_arrives(tmp_path, probe):
    rule = PlateauRule(window=4, min_delta=50.0, warmup=0)
    trainer, callback = train(tmp_path, probe, steps=40, solve="background", stop=rule)
    assert trainer.state.global_step < 40
    assert callback.history[-1]["verdict"] == "plateau"
    assert callback.history[-1]["step"] <= trainer.state.global_step
    again, resumed = train(tmp_path, probe, steps=40, solve="now", stop=None, train_options={"save_strategy": "no"})
    assert again.state.global_step == 40
    assert resumed.history[-1]["step"] == 40


def test_failing_solve_is_a_record_without_a_value_and_training_goes_on(tmp_path, probe, monkeypatch):
    calls, solve = [], distances.transport_maps

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 8:  # three layers an evaluation: in the third one
            raise NumericsError("this solve went wrong")
        return solve(*arguments)

    monkeypatch.setattr(distances, "transport_maps", failing)
    with pytest.warns(UserWarning, match="step 4: MIR evaluation failed, training goes on: this solve went wrong"):
        trainer, callback = train(tmp_path, probe, solve="background")
    assert [record["mir"] is None for record in callback.history] == [False, False, True, False]
    assert trainer.state.global_step == STEPS


def test_eval_mir_is_there_when_the_trainer_chooses_by_it(tmp_path, probe):
    options = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_mir",
        "greater_is_better": False,
    }
    trainer = make_trainer(tmp_path, steps=4, evaluated=2, **options)
    callback = MIRCallback(probe, every=2, solve="background").attach(trainer)
    trainer.train()
    best = min(record["mir"] for record in callback.history if record["step"] > 0)
    assert trainer.state.best_metric == best


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solve": "later"}, "solve must be one of now, background, got 'later'"),
        ({"solve": "background", "keep_best": True}, "solve='background' must come without keep_best"),
        ({"standard_error": 1}, "standard_error must be True or False, got 1"),
    ],
)
def test_wrong_options_are_refused(probe, options, message):
    with pytest.raises(ConfigError, match=message):
        MIRCallback(probe, **options)
