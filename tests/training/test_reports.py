# SPDX-License-Identifier: Apache-2.0
"""What other trackers hold afterwards, read back with their own readers; and what happens when one fails."""

import os

import pytest
from transformers import TrainerCallback

from mir_callback import MIRCallback, Probe
from mir_callback.loggers import log_values
from mir_callback.record import EvalRecord
from tests.logs import logged
from tests.samples import pairs
from tests.training.runs import losses, make_trainer


@pytest.fixture(scope="module")
def probe():
    return Probe.from_pairs(pairs(4))


def values_of(callback):
    """Name and step to value, of all scalars of a run."""
    found = {}
    for count, record in enumerate(callback.history, start=1):
        for name, value in log_values(record, callback.history[:count]).items():
            found[name, record.step] = value
    return found


def test_tensorboard_has_every_value_at_its_step_and_the_definition_once(tmp_path, probe, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(tmp_path / "run", steps=3, report_to=["tensorboard"])
    callback = MIRCallback(probe, every=1).attach(trainer)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    names = {name for name in events.Tags()["scalars"] if name.startswith("train/mir")}
    read = {(name, event.step): event.value for name in names for event in events.Scalars(name)}
    expected = {(f"train/{name}", step): value for (name, step), value in values_of(callback).items()}
    assert read == pytest.approx(expected, rel=1e-6)
    assert sum(len(events.Scalars(name)) for name in names) == len(expected)  # none twice
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    (definition,) = events.Tensors("mir/definition/text_summary")
    assert probe.fingerprint.encode() in definition.tensor_proto.string_val[0]


class Refusing(TrainerCallback):
    """A reporter that cannot log MIR."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "mir" in logs:
            raise ConnectionError("no route to the tracking server")


def test_a_reporter_that_raises_costs_one_warning_and_no_loss_line(tmp_path, probe):
    trainer = make_trainer(tmp_path, steps=4)
    trainer.add_callback(Refusing())
    callback = MIRCallback(probe, every=1).attach(trainer)
    with logged("ConnectionError: no route") as messages:
        trainer.train()
    assert len(messages) == 1
    assert [step for step, _ in losses(trainer)] == [1, 2, 3, 4]
    assert len(callback.history) == 5
    assert (tmp_path / "mir_history.jsonl").read_text().count("\n") == 5


def test_without_any_reporter_there_is_the_history_and_the_log(tmp_path, probe):
    trainer = make_trainer(tmp_path, steps=2)
    callback = MIRCallback(probe, every=1).attach(trainer)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "mir" in entry]
    assert [entry["mir"] for entry in entries] == [record.mir for record in callback.history]
    assert sorted(os.listdir(tmp_path)) == ["mir_history.jsonl", "mir_probe.zip"]


def record(step, mir, **fields):
    return EvalRecord(step=step, mir=mir, per_layer=[1.0, 2.0], seconds=0.5, **fields)


def test_values_hold_the_best_so_far_and_the_share_of_the_time():
    history = [record(0, 2.5), record(5, None), record(10, 2.0), record(15, 2.0)]
    assert log_values(record(20, 2.25, train_seconds=30.0, eval_seconds=10.0), history) == {
        "mir": 2.25,
        "mir_layer/01": 1.0,
        "mir_layer/02": 2.0,
        "mir_seconds": 0.5,
        "mir_best": 2.0,
        "mir_best_step": 10,
        "mir_time_share": 0.25,
    }
    assert log_values(record(5, None), history) == {}


def test_companions_are_logged_as_one_number_each():
    companions = {
        "mean_part": [0.5, 1.0],
        "covariance_part": [0.5, 1.0],
        "norm_ratio": [4.0, 2.0],
        "cosine": [-0.5, 0.5],
        "vision_rank": [10.0, 20.0],
        "text_rank": [30.0, 50.0],
    }
    values = log_values(record(1, 0.5, mir_se=0.01, companions=companions))
    assert values["mir_se"] == 0.01
    assert values["mir_mean_share"] == 0.5
    assert values["mir_norm_ratio"] == 3.0
    assert values["mir_cosine"] == 0.0
    assert (values["mir_vision_rank"], values["mir_text_rank"]) == (15.0, 40.0)
