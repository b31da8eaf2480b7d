# SPDX-License-Identifier: Apache-2.0
"""The callback in real runs of the stock Trainer, on one process (tests/distributed has the sharded ones)."""

import math

import pytest
import torch
from transformers import TrainerCallback

from mir_callback import MIRCallback, PlateauRule, Probe, Verdict, evaluate_mir
from mir_callback.errors import ConfigError, HistoryError
from mir_callback.history import read_history
from tests import reference, tiny_models
from tests.logs import logged
from tests.samples import pairs
from tests.training.runs import losses, make_trainer


@pytest.fixture(scope="module")
def probe():
    return Probe.from_pairs(pairs(6))


def file_records(folder):
    return read_history(folder / "mir_history.jsonl")


def test_evaluates_at_start_every_n_steps_and_at_the_end(tmp_path, probe):
    trainer = make_trainer(tmp_path, steps=5)
    callback = MIRCallback(probe, every=2).attach(trainer)
    trainer.train()
    assert [record.step for record in callback.history] == [0, 2, 4, 5]
    assert file_records(tmp_path) == callback.history
    for record in callback.history:
        assert math.isfinite(record.mir)
        assert len(record.per_layer) == tiny_models.LAYERS
        assert record.probe_fingerprint == probe.fingerprint
        assert record.root == "exact"
        assert record.seconds > 0


def test_the_probe_is_kept_beside_the_history_unless_that_is_switched_off(tmp_path, probe):
    for keep in (True, False):
        trainer = make_trainer(tmp_path / str(keep), steps=1)
        MIRCallback(probe, save_probe=keep).attach(trainer)
        trainer.train()
    assert Probe.load(tmp_path / "True/mir_probe.zip").fingerprint == probe.fingerprint
    assert not (tmp_path / "False/mir_probe.zip").exists()


def test_a_probe_that_cannot_be_kept_is_reported_and_training_goes_on(tmp_path, probe):
    (tmp_path / "mir_probe.zip").write_text("mine")
    trainer = make_trainer(tmp_path, steps=1)
    callback = MIRCallback(probe).attach(trainer)
    with logged("could not save the probe"):
        trainer.train()
    assert len(callback.history) == 2
    assert (tmp_path / "mir_probe.zip").read_text() == "mine"


def test_values_are_those_of_the_weights_at_that_step(tmp_path, probe):
    trainer = make_trainer(tmp_path, steps=2)
    before = evaluate_mir(trainer.model, probe, processor=trainer.processing_class)
    callback = MIRCallback(probe, every=50).attach(trainer)
    trainer.train()
    after = evaluate_mir(trainer.model, probe, processor=trainer.processing_class)
    assert [record.mir for record in callback.history] == [before.mir, after.mir]
    assert before.mir != after.mir


def test_no_loss_line_is_swallowed_and_values_reach_the_log_history(tmp_path, probe):
    trainer = make_trainer(tmp_path, steps=4)
    callback = MIRCallback(probe, every=1).attach(trainer)
    trainer.train()
    assert [step for step, _ in losses(trainer)] == [1, 2, 3, 4]
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "mir" in entry}
    assert sorted(logged) == [0, 1, 2, 3, 4]
    for record in callback.history:
        entry = logged[record.step]
        assert entry["mir"] == record.mir
        assert [entry[f"mir_layer/{k:02d}"] for k in (1, 2, 3)] == record.per_layer
        assert entry["mir_seconds"] == record.seconds


def test_logging_only_every_few_steps_stays_so(tmp_path, probe):
    trainer = make_trainer(tmp_path, steps=6, logging_steps=3)
    MIRCallback(probe, every=2).attach(trainer)
    trainer.train()
    assert [step for step, _ in losses(trainer)] == [3, 6]


def test_plain_callback_writes_history_and_says_once_what_attach_adds(tmp_path, probe, capsys):
    trainer = make_trainer(tmp_path, steps=2)
    callback = MIRCallback(probe, every=1)
    trainer.add_callback(callback)
    trainer.train()
    assert [record.step for record in file_records(tmp_path)] == [0, 1, 2]
    printed = capsys.readouterr().out
    assert printed.count("MIRCallback(...).attach(trainer)") == 1
    assert not any("mir" in entry for entry in trainer.state.log_history)
    assert callback.history


def test_one_console_line_per_evaluation(tmp_path, probe, capsys):
    trainer = make_trainer(tmp_path, steps=2)
    callback = MIRCallback(probe, every=1).attach(trainer)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[mir]")]
    lines = [line for line in lines if " step " in line]
    assert len(lines) == 3
    before, last = callback.history[1:]
    change = f"({last.mir - before.mir:+.4f})"
    assert lines[2].startswith(f"[mir] step 2: MIR {last.mir:.4f} +- {last.mir_se:.4f} {change}, ")


def test_attach_adds_the_callback_once(tmp_path, probe):
    trainer = make_trainer(tmp_path)
    callback = MIRCallback(probe)
    assert callback.attach(trainer) is callback
    callback.attach(trainer)
    assert trainer.callback_handler.callbacks.count(callback) == 1


class AtStep:
    """A rule that says plateau at a given step."""

    def __init__(self, step):
        self.step = step

    def verdict(self, history):
        return Verdict("plateau" if history[-1].step == self.step else "going on", "because the test says so")


def test_training_stops_at_the_step_the_rule_names(tmp_path, probe, capsys):
    trainer = make_trainer(tmp_path, steps=50)
    callback = MIRCallback(probe, every=2, stop=AtStep(4)).attach(trainer)
    trainer.train()
    assert trainer.state.global_step == 4
    assert [record.verdict for record in callback.history] == ["going on", "going on", "plateau"]
    assert callback.history[-1].reason == "because the test says so"
    assert "step 4: MIR" in capsys.readouterr().out


def test_plateau_rule_stops_a_run_that_does_not_move(tmp_path, probe):
    trainer = make_trainer(tmp_path, steps=50, learning_rate=0.0)
    rule = PlateauRule(window=4, warmup=2, horizon=None, wait_for_schedule=False)  # 3 epochs
    callback = MIRCallback(probe, every=1, stop=rule).attach(trainer)
    trainer.train()
    assert trainer.state.global_step == 5
    assert [record.verdict for record in callback.history] == ["no data"] * 5 + ["plateau"]


class Broken:
    """A rule with a mistake in it."""

    def verdict(self, history):
        raise KeyError("bug")


def test_a_stop_rule_that_fails_is_reported_and_training_goes_on(tmp_path, probe):
    trainer = make_trainer(tmp_path, steps=2)
    callback = MIRCallback(probe, every=1, stop=Broken()).attach(trainer)
    with logged("KeyError: 'bug'"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert callback.history[-1].reason == "the stop rule failed: KeyError: 'bug'"


def test_a_second_callback_is_refused(tmp_path, probe):
    trainer = make_trainer(tmp_path)
    MIRCallback(probe).attach(trainer)
    with pytest.raises(ConfigError, match="MIRCallback"):
        MIRCallback(probe).attach(trainer)


class Poison(TrainerCallback):
    """Puts NaN into a weight at a step and takes it out at another."""

    def __init__(self, start, end):
        self.start, self.end = start, end

    def on_step_end(self, args, state, control, model=None, **kwargs):
        weight = model.model.language_model.layers[1].mlp.down_proj.weight.data
        if state.global_step == self.start:
            self.saved = weight[0, 0].clone()
            weight[0, 0] = math.nan
        elif state.global_step == self.end:
            weight[0, 0] = self.saved


def test_a_failed_evaluation_warns_leaves_a_line_and_training_goes_on(tmp_path, probe, capsys):
    trainer = make_trainer(tmp_path, steps=4, learning_rate=0.0, max_grad_norm=0.0)
    trainer.add_callback(Poison(2, 2))
    callback = MIRCallback(probe, every=2, stop=PlateauRule()).attach(trainer)
    with logged("step 2: MIR evaluation failed, training goes on: layer 2: "):
        trainer.train()
    assert trainer.state.global_step == 4
    failed = file_records(tmp_path)[1]
    assert failed.mir is None
    assert failed.error.startswith("NumericsError: layer 2: ")
    assert failed.probe_fingerprint == probe.fingerprint
    assert failed.verdict == "no data"
    assert "step 2: evaluation failed" in capsys.readouterr().out
    assert callback.history[1] == failed


def test_a_failing_first_evaluation_ends_the_run_before_a_step(tmp_path, probe):
    trainer = make_trainer(tmp_path)
    with torch.no_grad():
        trainer.model.model.language_model.layers[0].mlp.down_proj.weight.fill_(math.nan)
    MIRCallback(probe).attach(trainer)
    with pytest.raises(ValueError, match="layer 1: .* vision tokens are NaN"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_resumed_run_continues_its_history(tmp_path, probe):
    whole = make_trainer(tmp_path / "whole", steps=6, save_strategy="steps", save_steps=3)
    first = MIRCallback(probe, every=2).attach(whole)
    whole.train()
    resumed = make_trainer(tmp_path / "whole", steps=6, save_strategy="steps", save_steps=3)
    second = MIRCallback(probe, every=2).attach(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert [record.step for record in second.history] == [0, 2, 4, 6]
    assert second.history[:2] == first.history[:2]
    assert len(list((tmp_path / "whole").glob("mir_history*.jsonl"))) == 2


def test_resume_with_another_probe_is_refused(tmp_path, probe):
    trainer = make_trainer(tmp_path, steps=3, save_strategy="steps", save_steps=3)
    MIRCallback(probe, every=2).attach(trainer)
    trainer.train()
    resumed = make_trainer(tmp_path, steps=6)
    MIRCallback(Probe.from_pairs(pairs(5, seed=1)), every=2).attach(resumed)
    with pytest.raises(HistoryError, match="probe_fingerprint"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [record.step for record in file_records(tmp_path)] == [0, 2, 3]


def test_mixed_precision_training_is_measured_under_its_autocast(tmp_path, probe):
    trainer = make_trainer(tmp_path, steps=1, bf16=True)
    model, processor = tiny_models.llava(dropout=0.1)
    single = evaluate_mir(model, probe, processor=processor).mir
    with torch.autocast("cpu", torch.bfloat16):
        rows = reference.hidden_rows(model, processor, pairs(6))
    callback = MIRCallback(probe, batch_size=1).attach(trainer)
    trainer.train()
    assert callback.history[0].mir == pytest.approx(reference.rate(*rows)[0], abs=1e-6)
    assert callback.history[0].mir != pytest.approx(single, abs=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every.* 0"),
        ({"root": "fast"}, "root .*exact, paper_fast.*'fast'"),
        ({"batch_size": 0}, "batch_size.* 0"),
        ({"stop": PlateauRule}, "stop=<class"),
        ({"stop": True}, "stop=True"),
        ({"probe": "folder"}, "probe='folder'"),
    ],
)
def test_error_names_the_option_when_it_breaks_its_rule(probe, options, message):
    with pytest.raises(ConfigError, match=message):
        MIRCallback(**{"probe": probe, **options})


def test_error_at_attach_when_the_trainers_processor_cannot_handle_images(tmp_path, probe):
    trainer = make_trainer(tmp_path)
    trainer.processing_class = trainer.processing_class.tokenizer
    with pytest.raises(ConfigError, match="PreTrainedTokenizer|TokenizersBackend"):
        MIRCallback(probe).attach(trainer)


def test_error_when_attached_to_something_else(probe):
    with pytest.raises(ConfigError, match="int is not a transformers Trainer"):
        MIRCallback(probe).attach(3)
