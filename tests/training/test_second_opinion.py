# SPDX-License-Identifier: Apache-2.0
"""What vision gain says against MIR: the rule, and where a user meets it."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mir_callback import MIRCallback, MIRMonitor, Probe
from mir_callback.cli import main
from mir_callback.history import read_history
from mir_callback.loggers import due_alerts
from mir_callback.record import EvalRecord
from mir_callback.second_opinion import find_contradiction
from tests import tiny_models
from tests.logs import logged_here
from tests.samples import pairs
from tests.training.runs import make_trainer


def history(mirs, gains, *, max_steps=20, **fields):
    return [
        EvalRecord(step=10 * number, mir=mir, vision_gain=gain, max_steps=max_steps, **fields)
        for number, (mir, gain) in enumerate(zip(mirs, gains, strict=True))
    ]


def kind_of(records):
    found = find_contradiction(records)
    return None if found is None else found.kind


@pytest.mark.parametrize(
    ("mirs", "gains", "kind"),
    [
        ([2.4, 3.6, 2.9, 2.7], [0.0, 0.2, 1.5, 1.9], None),  # as it should be
        ([2.4, 3.6, 3.8, 3.9], [0.0, 0.0, 0.001, -0.002], "unused"),  # whatever MIR does
        ([2.4, 3.6, 2.9, 2.0], [0.0, 0.2, 1.5, 1.52], "not more"),  # the last fall is for nothing
        ([2.4, 3.6, 2.9, 2.0], [0.0, 0.2, 1.5, 1.2], "not more"),
        ([2.4, 3.6, 2.9, 2.8], [0.0, 0.2, 1.9, 1.9], None),  # a small fall of a run that has levelled off
        ([2.4, 3.6, 2.9, 3.4], [0.0, 0.2, 1.9, 1.9], None),  # a rise
    ],
)
def test_kinds(mirs, gains, kind):
    assert kind_of(history(mirs, gains)) == kind


@pytest.mark.parametrize(("gains", "kind"), [((-0.05, -0.04), "not more"), ((0, 0.015), "not more"), ((0, 0.05), None)])
def test_a_fall_for_a_rise_that_is_next_to_nothing_is_for_nothing(gains, kind):
    assert kind_of(history([3.6, 2.6], gains, max_steps=1000)) == kind


def test_the_message_says_since_when_and_whether_only_norms_fell():
    records = history([2.9, 2.5, 2.0], [1.50, 1.49, 1.50], scale_free_mir=1.1)
    message = find_contradiction(records).message
    assert "0.90 since step 0" in message
    assert "1.500, then 1.500" in message
    assert "Scale-free MIR went from 1.100 to 1.100" in message
    falling = [EvalRecord(step=r.step, mir=r.mir, vision_gain=1.5, scale_free_mir=r.mir - 1) for r in records]
    assert "shorter" not in find_contradiction(falling).message


def test_vision_need_not_be_used_in_the_first_half_nor_before_the_first_step():
    gains = [0.0] * 5
    records = history([3.0] * 5, gains, max_steps=60)
    assert [kind_of(records[: count + 1]) for count in range(5)] == [None, None, None, "unused", "unused"]
    assert kind_of(history([3.0] * 5, gains, max_steps=None)) is None  # nobody knows how far it has come


@pytest.mark.parametrize(
    ("gain", "error", "kind"), [(0.05, 0.03, "unused"), (0.05, 0.01, None), (0.01, 0.001, "unused")]
)
def test_a_gain_within_its_error_is_none(gain, error, kind):
    assert kind_of(history([3.0, 3.0], [0.0, gain], vision_gain_se=error)) == kind


def test_nothing_is_said_without_vision_gain_and_other_stages_do_not_count():
    assert kind_of([]) is None
    assert kind_of(history([3.0, 1.0], [None, None])) is None
    assert kind_of([EvalRecord(step=10, mir=None, error="failed", vision_gain=0.0)]) is None
    first, second = history([3.0, 1.0], [1.5, 1.5])
    assert kind_of([first, second]) == "not more"
    assert kind_of([EvalRecord(step=0, mir=3.0, vision_gain=1.5, stage="a"), second]) is None


@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(-0.1, 3)), min_size=1, max_size=8),
    st.floats(-3, 3),
)
def test_only_differences_of_mir_count(values, shift):
    mirs, gains = zip(*values, strict=True)
    kinds = [kind_of(history(np.round(mirs, 3) + by, gains)) for by in (0.0, round(shift, 2))]
    falls = np.round([a - mirs[-1] for a in mirs], 3)
    if not np.any(np.abs(falls - 0.25) < 0.002):  # where rounding decides
        assert kinds[0] == kinds[1]


def test_a_run_whose_images_do_not_matter_is_called_once_and_on_record(tmp_path):
    trainer = make_trainer(tmp_path / "run", steps=4, learning_rate=0.0)
    probe = Probe.from_pairs(pairs(6), matched=True)
    callback = MIRCallback(probe, every=1, vision_gain=True).attach(trainer)
    with logged_here() as found:
        trainer.train()
    said = [message for message in found if "vision is not used" in message]
    assert len(said) == 1
    assert said[0].startswith("step 2: ")
    assert [record.contradiction is not None for record in callback.history] == [False, False, True, True, True]
    assert read_history(tmp_path / "run" / "mir_history.jsonl") == callback.history
    alerts = [due_alerts(callback.history[:n], record) for n, record in enumerate(callback.history)]
    assert [[alert.title for alert in each] for each in alerts] == [[], [], ["Vision gain contradicts MIR"], [], []]
    run = str(tmp_path / "run")
    assert main(["compare", run, "--json", str(tmp_path / "compare.json")]) == 0
    shown = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert any("vision is not used" in remark for remark in shown["remarks"])
    assert shown["recipes"][0]["runs"][0]["last"]["vision_gain"] == callback.history[-1].vision_gain
    assert main(["report", run, "--output", str(tmp_path / "page.html")]) == 0
    assert "Vision gain contradicts MIR" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_nothing_is_said_of_a_gain_that_is_no_number(tmp_path):
    model, processor = tiny_models.llava()
    calls = []

    def rule_out(_head, _args, logits):  # all tokens behind the right images
        calls.append(None)
        return logits.index_fill(2, torch.arange(1, logits.shape[2]), -torch.inf) if len(calls) % 2 else logits

    model.lm_head.register_forward_hook(rule_out)
    probe = Probe.from_pairs(pairs(4), matched=True)
    monitor = MIRMonitor(model, probe, processor=processor, output_dir=tmp_path, every=1, vision_gain=True)
    monitor.step(1)
    monitor.close()
    assert [(record.vision_gain, record.contradiction) for record in monitor.history] == [(None, None)] * 2
