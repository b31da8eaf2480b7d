# SPDX-License-Identifier: Apache-2.0
"""Probes that are damaged, changed, or smaller than the number of ranks."""

import json

import pytest

from mir_callback import MIRCallback, Probe
from mir_callback.errors import ConfigError, HistoryError, ProbeError
from tests.faults.runs import run_broken
from tests.faults.train_worker import STEPS
from tests.samples import pairs, write_folders
from tests.training.runs import make_trainer


def damage(path):
    path.write_bytes(path.read_bytes()[:-60])


def change(path):
    pairs(1, seed=7)[0][0].save(path)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("break_file", "elsewhere", "here"),
    [
        (
            damage,
            "ProbeError: rank 1 failed: ProbeError: Could not decode the image of part1/001.png",
            "ProbeError: Could not",
        ),
        (change, "ConfigError: probe_fingerprint differs between ranks", None),
    ],
)
def test_every_rank_refuses_before_the_first_step_when_one_has_another_image(tmp_path, break_file, elsewhere, here):
    for rank in (0, 1):
        write_folders(tmp_path / f"copy{rank}", 6)
    (path,) = (tmp_path / "copy1").rglob("001.png")
    break_file(path)
    run = run_broken(tmp_path, "none")
    assert run.ranks[0]["error"].startswith(elsewhere)
    assert run.ranks[1]["error"].startswith(here or elsewhere)
    assert all(rank["step"] == 0 and rank["seconds"] < 10 for rank in run.ranks)


@pytest.mark.faults
def test_three_ranks_measure_two_samples(tmp_path):
    run = run_broken(tmp_path, "none", processes=3, num_samples=2)
    assert run.code == 0
    for rank in run.ranks:
        assert rank["step"] == STEPS
        assert all(record.mir is not None and record.num_samples == 2 for record in rank["history"])
        assert [record.mir for record in rank["history"]] == [record.mir for record in run.ranks[0]["history"]]


def test_second_callback_is_refused_when_both_come_with_the_trainer(tmp_path):
    trainer = make_trainer(tmp_path, steps=2)
    first, second = MIRCallback(Probe.from_pairs(pairs(4))), MIRCallback(Probe.from_pairs(pairs(4, seed=1)))
    trainer.add_callback(first)
    trainer.add_callback(second)
    with pytest.raises(ConfigError, match="two MIRCallbacks"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert [record.step for record in first.history] == [0]
    assert [path.name for path in tmp_path.glob("*.jsonl")] == ["mir_history.jsonl"]
    trainer.remove_callback(second)
    trainer.train()  # a run after a refused one is a run of its own
    assert trainer.state.global_step == 2


@pytest.mark.faults
def test_resume_is_refused_when_a_text_of_the_probe_was_edited_between_runs(tmp_path):
    folder = Probe.from_pairs(pairs(4)).save(tmp_path / "probe")
    trainer = make_trainer(tmp_path / "run", steps=2, save_strategy="steps", save_steps=2)
    MIRCallback(Probe.load(folder), every=1).attach(trainer)
    trainer.train()
    before = (tmp_path / "run" / "mir_history.jsonl").read_text()
    manifest = json.loads((folder / "probe.json").read_text())
    manifest["samples"][1]["text"] += " edited"
    (folder / "probe.json").write_text(json.dumps(manifest))
    with pytest.raises(ProbeError, match="fingerprint"):
        Probe.load(folder)
    samples = [(image, text + " edited") for image, text in pairs(4)]
    resumed = make_trainer(tmp_path / "run", steps=4)
    MIRCallback(Probe.from_pairs(samples), every=1).attach(resumed)
    with pytest.raises(HistoryError, match="probe_fingerprint"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert (tmp_path / "run" / "mir_history.jsonl").read_text() == before
