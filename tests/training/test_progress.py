# SPDX-License-Identifier: Apache-2.0
"""What records say of how far a real run has come."""

import pytest

from mir_callback import MIRCallback, Probe
from tests.samples import pairs
from tests.training.runs import ACCUMULATION, MICRO_BATCH, losses, make_trainer


def test_records_say_loss_tokens_and_samples_when_the_trainer_counts_them(tmp_path):
    trainer = make_trainer(tmp_path, steps=4, include_num_input_tokens_seen=True, logging_steps=2)
    callback = MIRCallback(Probe.from_pairs(pairs(4)), every=1).attach(trainer)
    trainer.train()
    logged = dict(losses(trainer))
    assert sorted(logged) == [2, 4]
    # A step's loss is logged after its evaluation.
    assert [record.loss for record in callback.history] == [None, None, None, logged[2], logged[2]]
    assert [record.loss_step for record in callback.history] == [None, None, None, 2, 2]
    assert [record.samples_seen for record in callback.history] == [
        step * MICRO_BATCH * ACCUMULATION for step in range(5)
    ]
    tokens = [record.tokens_seen for record in callback.history]
    assert tokens[0] == 0
    assert tokens == sorted(set(tokens))
    assert tokens[-1] == trainer.state.num_input_tokens_seen


@pytest.mark.parametrize("counts", [False, "no"])
def test_tokens_are_unknown_when_the_trainer_does_not_count_them(tmp_path, counts):
    trainer = make_trainer(tmp_path, steps=1, include_num_input_tokens_seen=counts)
    callback = MIRCallback(Probe.from_pairs(pairs(4)), every=1).attach(trainer)
    trainer.train()
    assert [record.tokens_seen for record in callback.history] == [None, None]


def test_a_resumed_run_continues_what_its_records_say(tmp_path):
    options = {"include_num_input_tokens_seen": True, "save_strategy": "steps", "save_steps": 2}
    straight = MIRCallback(Probe.from_pairs(pairs(4)), every=2).attach(first := make_trainer(tmp_path / "a", **options))
    first.train()
    stopped = make_trainer(tmp_path / "b", **options)
    MIRCallback(Probe.from_pairs(pairs(4)), every=2).attach(stopped)
    stopped.train()
    resumed = make_trainer(tmp_path / "b", **options)
    again = MIRCallback(Probe.from_pairs(pairs(4)), every=2).attach(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    logged = dict(losses(resumed))
    assert [(record.tokens_seen, record.samples_seen) for record in again.history] == [
        (record.tokens_seen, record.samples_seen) for record in straight.history
    ]
    assert [record.loss for record in again.history] == [None, *(logged[step] for step in (1, 3, 5))]


def test_samples_are_counted_on_when_a_run_goes_on_with_another_batch(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "steps": 4}
    MIRCallback(Probe.from_pairs(pairs(4)), every=1).attach(first := make_trainer(tmp_path, **options))
    first.train()
    other = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 1}
    resumed = make_trainer(tmp_path, **options, **other)
    callback = MIRCallback(Probe.from_pairs(pairs(4)), every=1).attach(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    step = MICRO_BATCH * ACCUMULATION
    assert [record.samples_seen for record in callback.history] == [0, step, 2 * step, 2 * step + 1, 2 * step + 2]
