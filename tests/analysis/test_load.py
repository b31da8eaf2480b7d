# SPDX-License-Identifier: Apache-2.0
"""Runs as they are found on disk: whole ones of a real Trainer, and damaged ones."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mir_callback import MIRCallback, Probe
from mir_callback.analysis.load import noted_losses, read_run, read_runs
from mir_callback.errors import HistoryError
from mir_callback.history import read_records
from mir_callback.metric.frechet import ROOTS
from mir_callback.record import EvalRecord, is_count, is_number
from tests.analysis import pages
from tests.samples import pairs
from tests.training.runs import losses, make_trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real run with checkpoints: its folder, its Trainer, its callback."""
    folder = tmp_path_factory.mktemp("runs") / "recipe"
    options = {"save_strategy": "steps", "save_steps": 2, "include_num_input_tokens_seen": True}
    trainer = make_trainer(folder, steps=4, **options)
    callback = MIRCallback(Probe.from_pairs(pairs(4)), every=1, keep_best=True).attach(trainer)
    trainer.train()
    return folder, trainer, callback


@pytest.fixture
def run_folder(trained, tmp_path):
    return Path(shutil.copytree(trained[0], tmp_path / "recipe", symlinks=True))


def test_an_output_folder_gives_evaluations_and_losses(trained):
    folder, trainer, callback = trained
    run = read_run(folder)
    assert (run.name, run.problems, run.max_steps) == ("recipe", (), 4)
    assert list(run.records) == callback.history
    assert list(run.losses) == losses(trainer)
    assert [step for step, _ in run.tokens] == [0, 1, 2, 3, 4]
    by_file = read_run(folder / "mir_history.jsonl")
    assert (by_file.name, by_file.records, by_file.losses) == ("recipe", run.records, run.losses)


def test_a_checkpoint_gives_the_run_up_to_its_step(trained):
    folder, trainer, callback = trained
    run = read_run(folder / "checkpoint-2")
    assert (run.name, run.problems) == ("recipe/checkpoint-2", ())
    assert list(run.records) == callback.history[:3]
    assert list(run.losses) == losses(trainer)[:2]
    best = read_run(folder / "mir_best")
    assert best.measured[-1].mir == min(record.mir for record in callback.history[1:])


def test_a_checkpoint_says_so_when_its_step_was_not_measured(run_folder):
    (run_folder / "checkpoint-2").rename(run_folder / "checkpoint-7")
    run = read_run(run_folder / "checkpoint-7")
    assert "not measured at its step 7" in run.problems[0]


def test_a_downloaded_artifact_is_read_like_the_folder_of_a_run(trained, tmp_path):
    folder, _, callback = trained
    artifact = tmp_path / "artifacts" / "run-4f2a-mir:v3"
    artifact.mkdir(parents=True)
    for name in ("mir_history.jsonl", "mir_probe.zip"):
        shutil.copy(folder / name, artifact)
    run = read_run(artifact)
    assert (run.name, run.problems, run.max_steps) == ("run-4f2a-mir:v3", (), 4)
    assert list(run.records) == callback.history
    assert run.losses == noted_losses(callback.history)


def test_damaged_lines_are_told_and_the_rest_is_read(run_folder, trained):
    history = run_folder / "mir_history.jsonl"
    lines = history.read_text().splitlines()
    lines[1] = lines[1][:40]
    lines.insert(3, "\x00\x00\x00")
    history.write_text("\n".join(lines) + '\n{"step": 4, "mi', encoding="utf-8")
    run = read_run(run_folder)
    assert [record.step for record in run.records] == [0, 2, 3, 4]
    assert len(run.problems) == 3
    assert "line 2 " in run.problems[0]


def test_an_empty_history_is_a_run_without_values(tmp_path):
    (tmp_path / "mir_history.jsonl").touch()
    run = read_run(tmp_path)
    assert run.records == ()
    assert "no MIR in" in run.problems[0]


def test_a_damaged_trainer_state_is_told_and_the_one_before_is_read(run_folder, trained):
    for state in (run_folder / "trainer_state.json", run_folder / "checkpoint-4" / "trainer_state.json"):
        state.write_text('{"log_history": [')
    run = read_run(run_folder)
    assert list(run.losses) == losses(trained[1])[:2]
    assert sum("trainer_state.json" in problem for problem in run.problems) == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "none", "none does not exist"),
        (lambda folder: folder, "no mir_history.jsonl in"),
        (lambda folder: _touched(folder / "x" / "mir_history.jsonl", folder), "e.g. .*/x$"),
        (lambda folder: _touched(folder / "checkpoint-3" / "config.json", folder / "checkpoint-3"), "mir eval"),
    ],
    ids=["missing", "foreign folder", "several runs", "checkpoint without history"],
)
def test_what_is_no_run_is_refused_by_name(tmp_path, make, words):
    with pytest.raises(HistoryError, match=words):
        read_run(make(tmp_path))
    assert re.search(words, read_runs([make(tmp_path)])[1][0])


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


@pytest.mark.parametrize("field", ["probe_loss", "expected_gain", "would_stop", "max_steps"])
@pytest.mark.parametrize("value", ["much", [1.0], {"a": 1}])
def test_fields_that_cannot_be_are_left_out_and_told(tmp_path, field, value):
    (tmp_path / "h.jsonl").write_text(json.dumps({"step": 1, "mir": 2.0, field: value}) + "\n")
    run = read_run(tmp_path / "h.jsonl")
    assert run.records[0][field] is None
    assert field in run.problems[0]


def test_a_step_beyond_all_runs_is_no_record(tmp_path):
    (tmp_path / "h.jsonl").write_text('{"step": 1' + 400 * "0" + ', "mir": 2.0}\n{"step": 5, "mir": 2.0}\n')
    run = read_run(tmp_path / "h.jsonl")
    assert [record.step for record in run.records] == [5]


def test_steps_are_put_in_order_and_the_last_of_each_counts(tmp_path):
    lines = [{"step": 2, "mir": 3.0}, {"step": 1, "mir": 4.0}, {"step": 2, "mir": 5.0}, {"step": 0, "mir": None}]
    path = tmp_path / "h.jsonl"
    path.write_text("".join(json.dumps({**line, "root": "odd"}) + "\n" for line in lines))
    records, messages = read_records(path)
    assert [(record.step, record.mir) for record in records] == [(0, None), (1, 4.0), (2, 5.0)]
    assert [word in " ".join(messages) for word in ("order of steps", "same step", "root 'odd'")] == [True] * 3


@pytest.mark.parametrize("root", ROOTS)
def test_roots_of_the_metric_are_known(tmp_path, root):
    (tmp_path / "h.jsonl").write_text(json.dumps({"step": 0, "mir": 1.0, "root": root}))
    assert read_records(tmp_path / "h.jsonl")[1] == []


def test_the_first_findings_of_a_kind_are_said_and_the_others_counted(tmp_path):
    (tmp_path / "h.jsonl").write_text(5 * "?\n" + '{"step": 1, "mir": 2.0}\n')
    messages = read_records(tmp_path / "h.jsonl")[1]
    assert [re.findall(r"line \d|\d more", message) for message in messages] == [
        ["line 1"],
        ["line 2"],
        ["line 3"],
        ["2 more"],
    ]


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.just("exact")
ANYTHING = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.just("cosine"), st.lists(SCALARS, max_size=2))
FIELDS = ["mir_se", "per_layer", "influences", "num_samples", "loss", "root", "companions", "tokens_seen", "elapsed"]


@given(st.integers(0, 9), st.dictionaries(st.sampled_from(FIELDS), ANYTHING))
def test_fields_that_stay_are_what_their_names_say(step, fields):
    damaged = []
    record = EvalRecord.from_dict({"step": step, "mir": 1.0, **fields}, damaged)
    for value in (record.mir_se, record.loss, record.tokens_seen, record.elapsed):
        assert value is None or (type(value) in (int, float) and abs(value) < float("inf"))
    assert isinstance(record.root or "", str)
    for values in (record.per_layer, record.influences):
        assert all(type(value) in (int, float) for value in values or [])
    if record.influences and record.num_samples is not None:
        assert len(record.influences) == record.num_samples
    assert len(damaged) == sum(record[name] is None and value is not None for name, value in fields.items())


@given(st.binary(max_size=200))
def test_any_file_is_read(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "h.jsonl"
    path.write_bytes(content)
    records, _ = read_records(path)
    assert isinstance(records, list)


NUMBERS = st.integers() | st.floats() | st.booleans() | st.sampled_from([10**400, -1e100, 1e100, 2**53, 1, 0.5])


@given(st.lists(NUMBERS, max_size=5), st.sampled_from(["per_layer", "influences", "vision_outliers"]))
@example([-1e100], "influences")
def test_a_list_is_valid_if_each_of_its_numbers_is(values, field):
    rules = {"per_layer": lambda value: is_number(value) and value >= 0, "influences": is_number}
    expected = bool(values) and all(map(rules.get(field, is_count), values))
    record = EvalRecord.from_dict({"step": 1, "mir": 1.0, field: values}, [])
    assert record[field] == (values if expected else None)


ODD = ['a "per_layer": [1, 2] of their own', "}", "]", "\\", '"', "ä"]
OF_LAYERS = ("per_layer", "per_layer_se", "companions", "vision_outliers", "text_outliers")


@given(st.sampled_from(ODD), st.sampled_from([(",", ":"), (", ", ": ")]), st.booleans())
def test_a_brief_record_is_the_whole_one_without_values_of_layers(odd, separators, inside):
    values = {**pages.records(2)[1], "vision_outliers": [1, 2], "text_outliers": [0], "reason": odd, "error": odd}
    values["companions"] = {"norm_ratio": [1.0], (odd if inside else "cosine"): [0.5, 1e-7], "none": []}
    line = json.dumps({**values, "their_own": odd, "last": {odd: [1, odd]}}, separators=separators)
    whole, brief = EvalRecord.from_line(line, []), EvalRecord.from_line(line, [], brief=True)
    assert list(brief.influences) == whole.influences
    assert all(brief[name] is None for name in OF_LAYERS)
    assert set(whole.unknown) - set(brief.unknown) == {"last"}  # lists and objects
    changed = {**dict.fromkeys(OF_LAYERS), "influences": whole.influences, "unknown": brief.unknown}
    assert replace(whole, **changed) == replace(brief, influences=whole.influences)
    assert json.loads(brief.to_line())["influences"] == whole.influences


def test_values_of_layers_are_read_of_the_records_asked_for(tmp_path):
    path = tmp_path / "h.jsonl"
    lines = [json.dumps(values) for values in pages.records(4)]
    path.write_text("\n".join([*lines[:2], lines[2].replace('"per_layer": [', '"per_layer": [1,,'), lines[3]]))
    records, messages = read_records(path, lambda found: found[1:3])
    assert [record.per_layer is None for record in records] == [True, False, True, True]
    assert [record.mir for record in records] == [values["mir"] for values in pages.records(4)]
    assert re.search("step 20: ignored", messages[0])


@pytest.mark.parametrize("damaged", ["[1,,2]", "[1 2]", "[--1]", "[01]", "[1.]", "[1,]"])
@pytest.mark.parametrize("layers_of", [None, lambda records: records, lambda records: ()])
def test_a_line_that_is_damaged_in_values_of_layers_counts_however_much_is_read(tmp_path, damaged, layers_of):
    values = pages.records(1)[0]
    line = json.dumps({**values, "per_layer": "HERE"}).replace('"HERE"', damaged)
    (tmp_path / "h.jsonl").write_text(line + "\n")
    (record,), messages = read_records(tmp_path / "h.jsonl", layers_of)
    assert (record.mir, record.per_layer) == (values["mir"], None)
    assert bool(messages) == (layers_of is None or bool(layers_of([record])))
