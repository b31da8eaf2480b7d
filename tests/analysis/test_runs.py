# SPDX-License-Identifier: Apache-2.0
"""Runs as they are found on disk: whole ones of a real Trainer, and damaged ones."""

import json
import shutil
from pathlib import Path

import pytest
import wandb
from hypothesis import given
from hypothesis import strategies as st

from mir_callback import MIRCallback, Probe
from mir_callback.analysis.load import cleaned, read_records, read_run, read_runs
from mir_callback.errors import HistoryError
from tests.samples import pairs
from tests.training import wandb_file
from tests.training.runs import losses, make_trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real run with checkpoints, reported to wandb offline: its folder, its Trainer, its callback."""
    folder = tmp_path_factory.mktemp("runs") / "recipe"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_DIR", str(folder))
        patch.setenv("WANDB_SILENT", "true")
        folder.mkdir()
        options = {"save_strategy": "steps", "save_steps": 2, "include_num_input_tokens_seen": True}
        trainer = make_trainer(folder, steps=4, report_to=["wandb"], **options)
        callback = MIRCallback(Probe.from_pairs(pairs(4)), every=1, keep_best=True).attach(trainer)
        trainer.train()
        wandb.finish()
        wandb_file.finished(folder)  # another process writes it
        wandb.teardown()
    return folder, trainer, callback


@pytest.fixture
def run_folder(trained, tmp_path):
    return Path(shutil.copytree(trained[0], tmp_path / "recipe", symlinks=True))


def test_an_output_folder_gives_evaluations_and_losses(trained):
    folder, trainer, callback = trained
    run = read_run(folder)
    assert (run.name, run.kind, run.problems, run.max_steps) == ("recipe", "folder", (), 4)
    assert list(run.records) == callback.history
    assert list(run.losses) == losses(trainer)
    assert [step for step, _ in run.tokens] == [0, 1, 2, 3, 4]
    by_file = read_run(folder / "mir_history.jsonl")
    assert (by_file.kind, by_file.name, by_file.records, by_file.losses) == (
        "history",
        "recipe",
        run.records,
        run.losses,
    )


def test_a_checkpoint_gives_the_run_up_to_its_step(trained):
    folder, trainer, callback = trained
    run = read_run(folder / "checkpoint-2")
    assert (run.name, run.kind, run.problems) == ("recipe/checkpoint-2", "checkpoint", ())
    assert list(run.records) == callback.history[:3]
    assert list(run.losses) == losses(trainer)[:2]
    best = read_run(folder / "mir_best")
    assert best.measured[-1]["mir"] == min(record["mir"] for record in callback.history[1:])


def test_a_checkpoint_says_so_when_its_step_was_not_measured(run_folder):
    (run_folder / "checkpoint-2").rename(run_folder / "checkpoint-7")
    run = read_run(run_folder / "checkpoint-7")
    assert "step 7, where MIR was not measured" in run.problems[0]


@pytest.mark.parametrize("place", ["", "wandb", "wandb/latest-run", "file"])
def test_a_wandb_run_gives_the_same_values(trained, run_folder, place):
    folder, trainer, callback = trained
    (run_folder / "mir_history.jsonl").unlink()
    (file,) = run_folder.glob("wandb/offline-run-*/*.wandb")
    run = read_run(file if place == "file" else run_folder / place)
    assert (run.kind, run.problems, run.max_steps) == ("wandb", (), 4)
    assert list(run.losses) == losses(trainer)
    for record, expected in zip(run.records, callback.history, strict=True):
        for field in (
            "step",
            "mir",
            "per_layer",
            "seconds",
            "probe_fingerprint",
            "tokens_fingerprint",
            "root",
            "dtype",
        ):
            assert record[field] == expected[field]
    elapsed = [record["elapsed"] for record in run.records]
    assert elapsed == sorted(elapsed)


def test_a_wandb_file_is_read_as_another_reader_reads_it(trained):
    folder, _, _ = trained
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert list(read_wandb(file).rows) == wandb_file.rows(folder)


@given(data=st.data())
def test_a_wandb_file_that_is_cut_or_damaged_gives_what_is_whole(trained, tmp_path_factory, data):
    (file,) = trained[0].glob("wandb/offline-run-*/*.wandb")
    content, whole = file.read_bytes(), read_wandb(file).rows
    place = data.draw(st.integers(8, len(content) - 1))
    copy = tmp_path_factory.mktemp("cut") / "run-x.wandb"
    copy.write_bytes(content[:place])
    cut = read_wandb(copy)
    assert cut.rows == whole[: len(cut.rows)]
    copy.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
    damaged = read_wandb(copy)
    assert all(row in whole for row in damaged.rows)
    assert damaged.rows == whole or damaged.problems or len(damaged.rows) < len(whole)


def test_damaged_lines_are_told_and_the_rest_is_read(run_folder, trained):
    history = run_folder / "mir_history.jsonl"
    lines = history.read_text().splitlines()
    lines[1] = lines[1][:40]
    lines.insert(3, "\x00\x00\x00")
    history.write_text("\n".join(lines) + '\n{"step": 4, "mi', encoding="utf-8")
    run = read_run(run_folder)
    assert [record["step"] for record in run.records] == [0, 2, 3, 4]
    assert len(run.problems) == 3
    assert "line 2 is left out" in run.problems[0]


def test_an_empty_history_is_a_run_without_values(tmp_path):
    (tmp_path / "mir_history.jsonl").touch()
    run = read_run(tmp_path)
    assert run.records == ()
    assert "holds no value of MIR: it is empty" in run.problems[0]


def test_a_damaged_trainer_state_is_told_and_the_one_before_is_read(run_folder, trained):
    for state in (run_folder / "trainer_state.json", run_folder / "checkpoint-4" / "trainer_state.json"):
        state.write_text('{"log_history": [')
    run = read_run(run_folder)
    assert list(run.losses) == losses(trained[1])[:2]
    assert sum("no Trainer's state" in problem for problem in run.problems) == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "none", "there is no such file"),
        (lambda folder: folder, "holds no mir_history.jsonl and no .wandb file"),
        (lambda folder: _touched(folder / "x" / "mir_history.jsonl", folder), "name them, e.g."),
        (lambda folder: _touched(folder / "checkpoint-3" / "config.json", folder / "checkpoint-3"), "mir eval"),
        (lambda folder: _touched(folder / "run.wandb", folder / "run.wandb"), "must begin with wandb's mark"),
    ],
    ids=["missing", "foreign folder", "several runs", "checkpoint without history", "no wandb file"],
)
def test_what_is_no_run_is_refused_by_name(tmp_path, make, words):
    with pytest.raises(HistoryError, match=words):
        read_run(make(tmp_path))
    assert words in read_runs([make(tmp_path)])[1][0]


def _touched(path, result):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return result


def test_runs_of_equal_names_are_told_apart(tmp_path):
    paths = [tmp_path / name for name in ("a/seed_1/run", "b/seed_1/run", "b/seed_2/run", "other")]
    for path in paths:
        _touched(path / "mir_history.jsonl", None)
    runs, _ = read_runs([*paths, paths[0], tmp_path / "gone"])
    assert [run.name for run in runs] == [
        "a/seed_1/run",
        "b/seed_1/run",
        "seed_2/run",
        "other",
        "a/seed_1/run (2)",
    ]


@pytest.mark.parametrize("field", ["probe_loss", "mir_extrapolated", "expected_gain", "would_stop", "max_steps"])
@pytest.mark.parametrize("value", ["much", [1.0], {"a": 1}])
def test_fields_that_cannot_be_are_left_out_and_told(tmp_path, field, value):
    (tmp_path / "h.jsonl").write_text(json.dumps({"step": 1, "mir": 2.0, field: value}) + "\n")
    run = read_run(tmp_path / "h.jsonl")
    assert field not in run.records[0]
    assert field in run.problems[0]


def test_a_step_beyond_all_runs_is_no_record(tmp_path):
    (tmp_path / "h.jsonl").write_text('{"step": 1' + 400 * "0" + ', "mir": 2.0}\n{"step": 5, "mir": 2.0}\n')
    run = read_run(tmp_path / "h.jsonl")
    assert [record["step"] for record in run.records] == [5]


def test_steps_are_put_in_order_and_the_last_of_each_counts(tmp_path):
    lines = [{"step": 2, "mir": 3.0}, {"step": 1, "mir": 4.0}, {"step": 2, "mir": 5.0}, {"step": 0, "mir": None}]
    path = tmp_path / "h.jsonl"
    path.write_text("".join(json.dumps({**line, "root": "odd"}) + "\n" for line in lines))
    records, told = read_records(path)
    assert [(record["step"], record["mir"]) for record in records] == [(0, None), (1, 4.0), (2, 5.0)]
    assert [word in " ".join(told) for word in ("put in order", "same step", "root 'odd' is unknown")] == [True] * 3


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.just("exact")
ANYTHING = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.just("cosine"), st.lists(SCALARS, max_size=2))
FIELDS = ["mir_se", "per_layer", "influences", "num_samples", "loss", "root", "companions", "tokens_seen", "elapsed"]


@given(st.integers(0, 9), st.dictionaries(st.sampled_from(FIELDS), ANYTHING))
def test_fields_that_stay_are_what_their_names_say(step, fields):
    told = []
    record = cleaned({"step": step, "mir": 1.0, **fields}, told)
    for name in ("mir_se", "loss", "tokens_seen", "elapsed"):
        value = record.get(name)
        assert value is None or (type(value) in (int, float) and abs(value) < float("inf"))
    assert isinstance(record.get("root") or "", str)
    for name in ("per_layer", "influences"):
        assert all(type(value) in (int, float) for value in record.get(name) or [])
    if record.get("influences") and record.get("num_samples") is not None:
        assert len(record["influences"]) == record["num_samples"]
    assert len(told) == len(fields) + 2 - len(record)


@given(st.binary(max_size=200))
def test_any_file_is_read(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "h.jsonl"
    path.write_bytes(content)
    records, _ = read_records(path)
    assert isinstance(records, list)
