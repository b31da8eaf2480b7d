# SPDX-License-Identifier: Apache-2.0
"""What a run prints: one short line an evaluation, and notes before the first step."""

from functools import partial

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, get_scheduler

from mir_callback import EvalRecord, MIRCallback, PlateauRule, Probe
from mir_callback.config import MIRConfig
from mir_callback.console import evaluation_line, start_notes
from mir_callback.early_stopping import Verdict
from mir_callback.loggers import log_values
from mir_callback.lr_schedule import epoch_starts, find_drops, learning_rate_of, next_drop, next_epoch
from tests.samples import pairs
from tests.training.runs import make_trainer

LONG = "in the next 200 steps (10% of the run) MIR would fall by 0.0042 (standard error 0.0031), from 13 evaluations"
RULE = PlateauRule()


def line(verdict, **fields):
    record = EvalRecord(step=1234567, **{"mir": 12.34567, "mir_se": 0.01234, "seconds": 1234.56, **fields})
    return evaluation_line(record, verdict, [EvalRecord(step=1, mir=2.0), EvalRecord(step=2, mir=None)])


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (None, "MIR 12.3457 +- 0.0123 (+10.3457), 1234.6 s"),
        (Verdict("no data", LONG, summary="waiting (4 of 7)"), "waiting (4 of 7)"),
        (Verdict("going on", LONG, summary="falling"), "falling"),
        (Verdict("plateau", LONG), "plateau: stopping"),
        (Verdict("plateau", LONG, observed=True), "plateau: observing only"),
        (Verdict("too noisy", LONG), "too noisy"),
    ],
)
def test_an_evaluation_is_one_line_of_at_most_100_characters(verdict, words):
    printed = line(verdict)
    assert words in printed
    assert LONG not in printed
    assert len("[mir] " + printed) <= 100


def test_vision_gain_stands_beside_mir():
    record = EvalRecord(step=20000, mir=2.34567, mir_se=0.01, vision_gain=1.9249, seconds=0.66)
    printed = evaluation_line(record, Verdict("plateau", LONG, observed=True), [EvalRecord(step=1, mir=2.0)])
    assert printed.endswith(", vision gain 1.92, plateau: observing only, 0.7 s")


def test_a_failed_evaluation_is_one_short_line_too():
    printed = line(None, mir=None, error="NumericsError: " + 50 * "hidden states are NaN ")
    assert "evaluation failed: NumericsError" in printed
    assert len("[mir] " + printed) <= 100


def test_an_error_of_several_lines_is_printed_as_one():
    assert "\n" not in line(None, mir=None, error="CUDA error:\nkernel errors may be reported later")


def records(values):
    return [{"step": 50 * index, "mir": value, "max_steps": 2000} for index, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "summary"),
    [
        ([2.0] * 9, "waiting (4 of 5)"),
        ([3 - 0.05 * index for index in range(30)], "falling"),
        ([2.0] * 30, "plateau"),
        ([2 + 0.05 * index for index in range(30)], "rising"),
    ],
)
def test_a_verdict_is_said_in_a_word_or_three(values, summary):
    assert RULE.verdict(records(values)).summary == summary


@pytest.mark.parametrize(
    ("every", "steps", "is_said"), [(250, 2000, True), (150, 2000, False), ("5%", 2000, False), (250, None, False)]
)
def test_a_stop_rule_that_can_never_stop_is_said(every, steps, is_said):
    config = MIRConfig(every=every, stop=RULE)
    planned = config.planned_steps(steps)
    found = start_notes(config, 100, steps, 1.0)
    assert bool(found) == is_said
    if is_said:
        assert f"{len(planned)} evaluations are planned and it needs {RULE.min_evaluations}" in found[0]


@pytest.mark.parametrize("patience", [{"patience": 3}, {"patience_steps": 1}])
def test_the_rule_does_stop_at_its_fewest_evaluations(patience):
    rule = PlateauRule(window=5, warmup=2, **patience)
    flat = [{"step": 500 * index, "mir": 2.0, "max_steps": 2000} for index in range(rule.min_evaluations)]
    assert rule.verdict(flat).stop
    assert not rule.verdict(flat[:-1]).stop


@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        ({"every": "0.2ep"}, None),  # of a run that may have many
        ({"every": "0.2ep"}, 10),
        ({"every": "10,20", "also_on": "start,end,save"}, None),  # checkpoints may be many
    ],
)
def test_a_rule_that_may_stop_is_not_said_to_be_unable(options, epochs):
    assert start_notes(MIRConfig(stop="plateau", **options), 100, 1000, epochs) == []


@pytest.mark.parametrize(("count", "is_said"), [(19, True), (20, False)])
def test_a_small_probe_is_said(count, is_said):
    assert bool(start_notes(MIRConfig(), count, 2000, 1.0)) == is_said


def test_drops_matter_to_a_rule_that_stops_only():
    hasty = PlateauRule(wait_for_schedule=False)
    said = [
        start_notes(MIRConfig(stop=stop), 100, 2000, 1.0, [300, 600]) for stop in ("none", "observe", "plateau", hasty)
    ]
    assert [len(notes) for notes in said] == [0, 0, 1, 1]
    assert "step 300, 600" in said[2][0]
    assert "waits for step 600" in said[2][0]
    assert "does not wait" in said[3][0]


@pytest.mark.parametrize(("epochs", "words"), [(3, "waits for step 1333"), (1, None), (10, None)])
def test_further_epochs_are_said(epochs, words):
    notes = start_notes(MIRConfig(stop="plateau"), 100, 2000, epochs)
    assert (words in notes[0]) if words else notes == []


@pytest.mark.parametrize(("drop", "is_said"), [(1700, False), (1900, True)])
def test_a_rule_that_waits_too_long_to_stop_is_said(drop, is_said):
    notes = start_notes(MIRConfig(stop="plateau"), 100, 2000, 1.0, [drop])
    assert any("2 evaluations are planned after step 1900" in note for note in notes) == is_said


@pytest.mark.parametrize(("steps", "epochs"), [(900, 3), (901, 3.0), (1000, 2.5), (17, 4), (123_457, 7)])
def test_the_last_epoch_begins_where_no_other_follows(steps, epochs):
    starts = epoch_starts(steps, epochs)
    assert starts == [round(number * steps / epochs) for number in range(1, int(np.ceil(epochs)))]
    assert next_epoch(steps, epochs, 0) == starts[0]
    assert next_epoch(steps, epochs, starts[-1]) == starts[-1]  # trained on the epochs before only
    assert next_epoch(steps, epochs, starts[-1] + 1) is None


@pytest.mark.parametrize(
    ("steps", "epochs"), [(900, 1), (900, 0.3), (900, None), (None, 3), (900, 10), (10**6, 10**5), (900, 1.01)]
)
def test_no_epoch_is_waited_for_where_none_follows_or_each_is_short(steps, epochs):
    assert epoch_starts(steps, epochs) == []


OPTIMIZER = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
MILESTONES = partial(torch.optim.lr_scheduler.MultiStepLR, OPTIMIZER)


@pytest.mark.parametrize(
    ("scheduler", "drops"),
    [
        (get_scheduler("linear", OPTIMIZER, 30, 1000), []),
        (get_scheduler("cosine", OPTIMIZER, 30, 1000), []),
        (get_scheduler("constant", OPTIMIZER), []),
        (get_scheduler("constant_with_warmup", OPTIMIZER, 30), []),
        (MILESTONES([333, 666]), [333, 666]),
        (torch.optim.lr_scheduler.StepLR(OPTIMIZER, 400, gamma=0.5), [400, 800]),
        (torch.optim.lr_scheduler.CosineAnnealingLR(OPTIMIZER, 1000), []),
        (torch.optim.lr_scheduler.ReduceLROnPlateau(OPTIMIZER), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_drops_of_real_schedulers(scheduler, drops):
    before = dict(scheduler.state_dict())
    learning_rate = learning_rate_of(scheduler)
    assert (None if learning_rate is None else find_drops(learning_rate, 1000)) == drops
    assert dict(scheduler.state_dict()) == before


def test_a_schedule_of_the_users_is_not_called():
    scheduler = torch.optim.lr_scheduler.LambdaLR(OPTIMIZER, lambda step: 1.0)
    assert learning_rate_of(scheduler) is None


@pytest.mark.parametrize("steps", [100, 1000, 10_000, 123_457])
def test_a_drop_is_found_to_the_step_whatever_the_length(steps):
    at = int(0.37 * steps)
    assert find_drops(lambda step: 1.0 if step < at else 0.2, steps) == [at]
    assert [next_drop([at], step) for step in (0, at, at + 1)] == [
        at,
        at,
        None,
    ]  # the step after it is the first lower one


def test_every_drop_by_exactly_thirty_percent_is_found():
    drops = [200, 400, 600, 800]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(OPTIMIZER, drops, gamma=0.7)
    assert find_drops(learning_rate_of(scheduler), 1000) == drops


def test_a_decay_after_a_level_phase_begins_where_it_begins():
    (drop,) = find_drops(lambda step: min(1.0, (1000 - step) / 200), 1000)
    assert 800 <= drop <= 803


class Removes(TrainerCallback):
    """Takes itself away, and another in, when MIR is logged."""

    def __init__(self, trainer):
        self.trainer, self.other = trainer, TrainerCallback()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.trainer.remove_callback(self)
        self.trainer.add_callback(self.other)


def test_callbacks_may_change_while_mir_is_logged(tmp_path):
    trainer = make_trainer(tmp_path, steps=1)
    removes = Removes(trainer)
    trainer.add_callback(removes)
    MIRCallback(Probe.from_pairs(pairs(4)), every=1).attach(trainer)
    trainer.train()
    assert removes not in trainer.callback_handler.callbacks
    assert removes.other in trainer.callback_handler.callbacks


@pytest.mark.parametrize("log_layers", [False, True])
def test_the_trainer_prints_layers_only_if_asked_and_logs_them_all(tmp_path, capsys, log_layers):
    trainer = make_trainer(tmp_path, steps=2)
    before = list(trainer.callback_handler.callbacks)
    callback = MIRCallback(Probe.from_pairs(pairs(4)), every=1, log_layers=log_layers).attach(trainer)
    trainer.train()
    printed = capsys.readouterr().out
    assert printed.count("'mir':") == 3
    assert ("mir_layer/" in printed) == log_layers
    assert all("mir_layer/01" in row for row in trainer.state.log_history if "mir" in row)
    assert trainer.callback_handler.callbacks == [*before, callback]


def test_the_best_value_is_the_lowest_after_the_first_step():
    history = [EvalRecord(step=step, mir=mir, seconds=1.0) for step, mir in ((0, 1.5), (10, 2.5), (20, 2.0))]
    assert "mir_best" not in log_values(history[0])
    assert [log_values(each, history[:index])["mir_best"] for index, each in enumerate(history) if index] == [2.5, 2.0]
