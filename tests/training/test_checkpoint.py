# SPDX-License-Identifier: Apache-2.0
"""The best model: kept in real runs of the stock Trainer, on disk whole, and harmless to everything else."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from mir_callback import MIRCallback, Probe
from mir_callback.analysis.load import read_run
from mir_callback.best_model import _MARKED, FOLDER_NAME, NOTE_NAME, BestModel
from mir_callback.errors import ConfigError, HistoryError
from mir_callback.history import FILE_NAME
from mir_callback.record import EvalRecord, lowest_record
from tests.logs import logged
from tests.samples import pairs
from tests.training.runs import losses, make_trainer, weights

DEFINITION = {"probe_fingerprint": "p", "tokens_fingerprint": "t", "root": "exact"}


@pytest.fixture(scope="module")
def probe():
    return Probe.from_pairs(pairs(6))


def note_of(folder):
    return json.loads((folder / FOLDER_NAME / NOTE_NAME).read_text())


def records_of(folder):
    return [json.loads(line) for line in (folder / FILE_NAME).read_text().splitlines()]


class Snapshots(TrainerCallback):
    """The weights of every step."""

    def __init__(self):
        self.taken = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.taken[state.global_step] = {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, probe):
    """A run that keeps its best, saves checkpoints and rotates them; (folder, trainer, callback, weights by step)."""
    folder = tmp_path_factory.mktemp("kept") / "run"
    trainer = make_trainer(folder, steps=8, save_strategy="steps", save_steps=2, save_total_limit=1)
    snapshots = Snapshots()
    trainer.add_callback(snapshots)
    callback = MIRCallback(probe, every=1, keep_best=True).attach(trainer)
    trainer.train()
    return folder, trainer, callback, snapshots.taken


def test_the_weights_kept_are_those_of_the_step_with_the_lowest_mir(finished):
    folder, _, callback, taken = finished
    best = lowest_record(callback.history)
    assert best.mir == min(record.mir for record in callback.history if record.step > 0)
    note = note_of(folder)
    assert (note["step"], note["mir"]) == (best.step, best.mir)
    for field in ("probe_fingerprint", "tokens_fingerprint", "pixels_fingerprint", "root", "dtype", "world_size"):
        assert note[field] == best[field]
    kept = AutoModelForImageTextToText.from_pretrained(folder / FOLDER_NAME).state_dict()
    expected = taken[best.step]
    assert kept.keys() == expected.keys()
    assert all(torch.equal(kept[name], expected[name]) for name in expected)


def test_rotation_and_the_search_for_a_checkpoint_do_not_see_it(finished):
    folder, *_ = finished
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-8"]
    assert get_last_checkpoint(str(folder)) == str(folder / "checkpoint-8")
    assert sorted(path.name for path in folder.glob("mir_best*")) == [FOLDER_NAME]


def test_training_is_the_same_to_the_last_bit(finished, tmp_path, probe):
    _, watched, _, _ = finished
    plain = make_trainer(tmp_path, steps=8, save_strategy="steps", save_steps=2, save_total_limit=1)
    plain.train()
    assert losses(watched) == losses(plain)
    expected = weights(plain)
    assert all(torch.equal(value, expected[name]) for name, value in weights(watched).items())


def test_resumed_run_knows_its_best_and_a_worse_one_does_not_overwrite_it(finished, tmp_path, probe, capsys):
    source, _, first, _ = finished
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    before = note_of(folder)
    # A value so low that nothing of the resumed run can reach it.
    lower = [{**each, "mir": -5.0} if each["step"] == before["step"] else each for each in records_of(folder)]
    (folder / FILE_NAME).write_text("".join(json.dumps(each) + "\n" for each in lower))
    (folder / FOLDER_NAME / NOTE_NAME).write_text(json.dumps({**before, "mir": -5.0}))
    resumed = make_trainer(folder, steps=10)
    MIRCallback(probe, every=1, keep_best=True).attach(resumed)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-8"))
    assert note_of(folder) == {**before, "mir": -5.0}
    assert f"mir_best holds the weights of step {before['step']}" in capsys.readouterr().out


def test_a_new_run_moves_the_best_model_of_an_earlier_one_aside(finished, tmp_path, probe):
    source, *_ = finished
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    before = note_of(folder)
    again = make_trainer(folder, steps=1, learning_rate=0.0)
    MIRCallback(probe, every=1, keep_best=True).attach(again)
    again.train()
    assert note_of(folder)["step"] == 1
    assert json.loads((folder / "mir_best.1" / NOTE_NAME).read_text()) == before


def test_error_when_the_callback_is_not_attached(tmp_path, probe):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(MIRCallback(probe, keep_best=True))
    with pytest.raises(ConfigError, match=r"keep_best.*\.attach\(trainer\)"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_failing_save_warns_training_goes_on_and_the_older_best_stays(tmp_path, probe, monkeypatch):
    trainer = make_trainer(tmp_path, steps=4, learning_rate=1e-2)
    callback = MIRCallback(probe, every=1, keep_best=True).attach(trainer)

    class FullDisk(TrainerCallback):
        """From step 2 on there is no room for another best model."""

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                callback._monitor._best.lowest = 100.0  # whatever comes is better
                monkeypatch.setattr(Path, "mkdir", full)

    mkdir = Path.mkdir

    def full(path, *arguments, **options):
        if ".mir_best" in str(path):
            raise OSError("No space left on device")
        mkdir(path, *arguments, **options)

    trainer.add_callback(FullDisk())
    with logged("step 2: could not save the best weights"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert note_of(tmp_path)["step"] == 1
    assert len(callback.history) == 5


class Files:
    """A saver of plain files, with a number in them."""

    def __init__(self, name="model.safetensors"):
        self.name, self.value = name, "0"

    def __call__(self, folder):
        (folder / self.name).write_text(self.value)
        (folder / "config.json").write_text("{}")


def record(step, mir):
    return EvalRecord(step=step, mir=mir, **DEFINITION, dtype="float32", world_size=1)


def opened(folder, records=(), saver=None, **changes):
    return BestModel(saver or Files(), folder, list(records), {**DEFINITION, **changes})


def test_only_lower_values_of_trained_weights_are_kept(tmp_path):
    best = opened(tmp_path)
    kept = []
    for step, mir in enumerate((1, 3, 2, None, 2, float("nan"), 1.5)):
        best.offer(record(step, mir))
        kept.append((tmp_path / FOLDER_NAME).exists() and note_of(tmp_path)["step"])
    assert kept == [False, 1, 2, 2, 2, 2, 6]


def test_the_lowest_value_is_that_of_what_is_kept_or_else_of_the_history(tmp_path):
    history = [record(0, 1.0), record(50, 2.5), record(100, 2.1)]
    assert opened(tmp_path, history).lowest == 2.1
    opened(tmp_path).offer(record(50, 2.5))  # and at step 100 the disk was full
    assert opened(tmp_path, history).lowest == 2.5
    assert opened(tmp_path, []).lowest is None  # another run's
    assert opened(tmp_path, history, root="paper_fast").lowest == 2.1


def test_what_counts_is_the_history_that_a_resumed_run_continues(tmp_path):
    history, saver = [record(0, 1.0), record(50, 2.5), record(100, 2.1)], Files()
    best = opened(tmp_path, saver=saver)
    for saver.value, each in zip("012", history, strict=True):
        best.offer(each)
    (tmp_path / FILE_NAME).write_text("".join(each.to_line() for each in history[:2]))
    for _ in range(2):  # killed before the next best, and resumed again
        left = opened(tmp_path, history[:2], saver)
        assert left.lowest == 2.5
        assert (tmp_path / FOLDER_NAME / saver.name).read_text() == "2"
        assert (note_of(tmp_path)["step"], note_of(tmp_path)["discarded"]) == (100, 50)
        with pytest.raises(HistoryError, match="step 100 that the run has left"):
            read_run(tmp_path / FOLDER_NAME)
    left.offer(record(60, 2.6))
    assert note_of(tmp_path)["step"] == 100
    saver.value = "new"
    left.offer(record(70, 2.3))  # above what the branch had that was left
    assert (note_of(tmp_path)["step"], note_of(tmp_path)["mir"]) == (70, 2.3)
    assert (tmp_path / FOLDER_NAME / saver.name).read_text() == "new"
    assert opened(tmp_path, [*history[:2], record(60, 2.6), record(70, 2.3)]).lowest == 2.3


@pytest.mark.parametrize(
    "damage", ['"mir": -1e400', '"mir": -1e99', '"mir": 1' + 400 * "0", '"mir": null', '"own": ' + 99999 * "["]
)
def test_a_damaged_note_blocks_no_save(tmp_path, damage):
    opened(tmp_path).offer(record(50, 2.5))
    note = (tmp_path / FOLDER_NAME / NOTE_NAME).read_text().replace('"mir": 2.5', damage)
    (tmp_path / FOLDER_NAME / NOTE_NAME).write_text(note)
    with logged(None if "-1e99" in damage else "no valid mir_best.json"):
        best = opened(tmp_path, [record(50, 2.5)])
    assert best.lowest == 2.5
    best.offer(record(100, 2.4))
    assert note_of(tmp_path)["step"] == 100
    assert (tmp_path / "mir_best.1" / NOTE_NAME).read_text() == note


@pytest.mark.parametrize("name", ["mir_best.new", "mir_best.old", ".mir_best.new", ".mir_best.1.new"])
def test_folders_of_the_user_are_never_deleted(tmp_path, name):
    opened(tmp_path).offer(record(50, 2.5))
    shutil.copytree(tmp_path / FOLDER_NAME, tmp_path / name)
    best = opened(tmp_path, [record(50, 2.5)])
    best.offer(record(100, 2.4))
    assert note_of(tmp_path)["step"] == 100
    assert json.loads((tmp_path / name / NOTE_NAME).read_text())["step"] == 50
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([FOLDER_NAME, name])


def test_links_in_the_place_of_the_best_model_are_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "theirs").write_text("")
    for name in (FOLDER_NAME, ".mir_best.new"):
        (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    opened(tmp_path).offer(record(50, 2.5))
    assert note_of(tmp_path)["step"] == 50
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["theirs"]
    assert (tmp_path / "mir_best.1").is_symlink()


def test_error_when_the_saver_writes_no_weights(tmp_path):
    best = opened(tmp_path, saver=Files("training_args.bin"))
    with logged(r"no weights were saved to .*config\.json, training_args\.bin"):
        best.offer(record(1, 2.0))
    assert list(tmp_path.iterdir()) == []


def whole(folder, step, mir=2.0):
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(str(step))
    (folder / NOTE_NAME).write_text(json.dumps({"step": step, "mir": mir, **DEFINITION}))


@pytest.mark.parametrize(
    ("left", "step"),
    [
        ({"mir_best": 1, ".mir_best.new/new": None}, 1),
        ({"mir_best": 1, ".mir_best.new/new": 2}, 2),
        ({".mir_best.new/old": 1, ".mir_best.new/new": 2}, 2),
        ({".mir_best.new/old": 1}, 1),
        ({"mir_best": 2, ".mir_best.new/old": 1}, 2),
        ({"mir_best": 2, ".mir_best.new/old": None}, 2),
    ],
)
def test_what_a_killed_process_left_is_put_right_at_the_next_start(tmp_path, left, step):
    for name, number in left.items():
        whole(tmp_path / name, number or 9)
        if number is None:
            (tmp_path / name / NOTE_NAME).write_text('{"step": 9, "mi')
    (tmp_path / ".mir_best.new" / "mir_callback.txt").write_text(_MARKED)
    opened(tmp_path, [record(1, 2.0)])
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER_NAME]
    assert (tmp_path / FOLDER_NAME / "model.safetensors").read_text() == str(step)
