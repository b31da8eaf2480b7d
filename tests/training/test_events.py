# SPDX-License-Identifier: Apache-2.0
"""Schedules, events and dry runs in real runs of the stock Trainer."""

import pytest
from transformers import IntervalStrategy

from mir_callback import AtSteps, EveryEpochs, LogSpaced, MIRCallback, PlateauRule, Probe, TimeShare
from mir_callback.errors import ConfigError
from tests.samples import pairs
from tests.training.runs import Pairs, losses, make_trainer


@pytest.fixture(scope="module")
def probe():
    return Probe.from_pairs(pairs(4))


def steps(callback):
    return [record.step for record in callback.history]


@pytest.mark.parametrize(
    ("every", "events", "expected"),
    [
        (EveryEpochs(0.25), ("start", "end"), [0, 4, 8, 12, 16, 20]),  # 16 steps an epoch
        (AtSteps((3, 17)), ("end",), [3, 17, 20]),
        (AtSteps(()), ("start",), [0]),
        (LogSpaced(3), (), [1, 2, 5, 10]),
        (TimeShare(0.99), ("start",), [0, 2, *range(3, 21)]),
    ],
)
def test_evaluates_when_the_schedule_says(tmp_path, probe, every, events, expected):
    trainer = make_trainer(tmp_path, steps=20)
    callback = MIRCallback(probe, every=every, also_on=events).attach(trainer)
    trainer.train()
    assert steps(callback) == expected


@pytest.mark.parametrize(
    ("every", "events"),
    [(EveryEpochs(0.2), ("start", "end")), (LogSpaced(4), ("start", "save")), (AtSteps((1, 7, 8, 19)), ("end",))],
)
def test_a_resumed_run_evaluates_where_an_unbroken_one_does(tmp_path, probe, every, events):
    options = {"steps": 20, "save_strategy": "steps", "save_steps": 7}
    whole = make_trainer(tmp_path, **options)
    first = MIRCallback(probe, every=every, also_on=events).attach(whole)
    whole.train()
    resumed = make_trainer(tmp_path, **options)
    second = MIRCallback(probe, every=every, also_on=events).attach(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    assert steps(second) == steps(first)
    for name in ("train_seconds", "eval_seconds"):
        times = [record[name] for record in second.history]
        assert times == sorted(times)


def test_evaluates_beside_the_trainers_own_and_at_checkpoints_once_a_step(tmp_path, probe):
    trainer = make_trainer(tmp_path, steps=8, save_strategy="steps", save_steps=6, logging_steps=3)
    trainer.eval_dataset = Pairs(4)
    trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 3
    callback = MIRCallback(probe, every=AtSteps(()), also_on=("evaluate", "save")).attach(trainer)
    trainer.evaluate()  # before training: nothing to do yet
    trainer.train()
    trainer.evaluate()
    assert steps(callback) == [3, 6, 8]  # the last one is the checkpoint at the end
    assert [step for step, _ in losses(trainer)] == [3, 6]


def test_a_plateau_found_at_a_checkpoint_stops_the_run(tmp_path, probe):
    trainer = make_trainer(tmp_path, steps=40, learning_rate=0.0, save_strategy="steps", save_steps=2)
    stop = PlateauRule(window=4, warmup=0, horizon=None, wait_for_schedule=False)  # 2.5 epochs
    callback = MIRCallback(probe, every=AtSteps(()), stop=stop, also_on=("save",)).attach(trainer)
    trainer.train()
    assert trainer.state.global_step == 8
    assert steps(callback) == [2, 4, 6, 8]


def test_records_say_how_the_time_was_spent(tmp_path, probe):
    trainer = make_trainer(tmp_path, steps=4)
    callback = MIRCallback(probe, every=2).attach(trainer)
    trainer.train()
    last = callback.history[-1]
    assert last.eval_seconds >= sum(record.seconds for record in callback.history)
    assert last.train_seconds + last.eval_seconds <= last.elapsed + 0.1
    assert last.step_seconds > 0
    logged = [entry for entry in trainer.state.log_history if "mir_time_share" in entry]
    share = last.eval_seconds / (last.train_seconds + last.eval_seconds)
    assert logged[-1]["mir_time_share"] == pytest.approx(share)


def test_a_callback_added_in_the_middle_of_a_run_is_an_error(tmp_path, probe):
    trainer = make_trainer(tmp_path, steps=2)
    callback = MIRCallback(probe, every=1)
    trainer.state.global_step = 1
    with pytest.raises(ConfigError, match="before trainer.train"):
        callback.on_step_end(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_a_dry_run_says_what_it_costs_and_trains_nothing(tmp_path, probe, capsys):
    trainer = make_trainer(tmp_path, steps=100)
    callback = MIRCallback(probe, every=EveryEpochs(0.5), dry_run=True).attach(trainer)
    with pytest.raises(SystemExit) as ended:
        trainer.train()
    assert ended.value.code == 0
    assert trainer.state.global_step == 0
    assert callback.history == []
    assert not (tmp_path / "mir_history.jsonl").exists()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[mir]")]
    assert "reports to no tracker" in said[0]
    assert str(tmp_path / "mir_history.jsonl") in said[0]
    assert 'report_to="wandb"' in said[0]
    assert "NOTE: the probe has" in said[1]
    assert "the first sample as the model gets it: [16 x <image>]" in said[2]
    said = said[3:]
    assert said[0].startswith("[mir] dry run: MIR ")
    assert "one evaluation: " in said[1]
    assert " GB more" in said[1]
    assert "14 evaluations in 100 steps with EveryEpochs(epochs=0.5), about" in said[2]  # 12 halves, start, end
    assert "no step was trained and no history was written" in said[3]


def test_a_dry_run_leaves_the_history_of_a_run_alone(tmp_path, probe):
    MIRCallback(probe, every=2).attach(trainer := make_trainer(tmp_path, steps=2))
    trainer.train()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    MIRCallback(probe, every=TimeShare(0.05), dry_run=True).attach(trainer := make_trainer(tmp_path, steps=2))
    with pytest.raises(SystemExit):
        trainer.train()
    assert set(before) == {"mir_history.jsonl", "mir_probe.zip"}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_error_when_dry_run_is_no_yes_or_no(probe):
    with pytest.raises(ConfigError, match="dry_run.*'yes'"):
        MIRCallback(probe, dry_run="yes")
