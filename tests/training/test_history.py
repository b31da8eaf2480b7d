# SPDX-License-Identifier: Apache-2.0
"""The history file: written line by line, continued on resume, never losing what was there."""

import json
import os

import numpy as np
import pytest

import mir_callback.console  # noqa: F401  # shows log lines, as in training
from mir_callback.errors import HistoryError
from mir_callback.history import FILE_NAME, History, read_history
from mir_callback.record import EvalRecord, shorten
from tests.analysis import pages

DEFINITION = {"probe_fingerprint": "p", "tokens_fingerprint": "t", "root": "exact"}


def record(step, **fields):
    return EvalRecord(**{"step": step, "mir": 2.0 - step / 1000, **DEFINITION, **fields})


def opened(folder, step=0, **changes):
    history = History()
    history.open(folder, step, {**DEFINITION, **changes})
    return history


def append(history, record):
    history.records.append(record)
    history.write()


@pytest.fixture
def run(tmp_path):
    history = opened(tmp_path / "deep" / "run")
    for step in (0, 50, 100):
        append(history, record(step))
    return tmp_path / "deep" / "run"


def lines(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_every_record_is_on_disk_at_once(tmp_path):
    history = opened(tmp_path)
    for count, step in enumerate((0, 50), start=1):
        append(history, record(step, mir=None, error="NumericsError: x"))
        assert len(read_history(tmp_path / FILE_NAME)) == count
    assert history.has_step(50)
    assert not history.has_step(0)


def test_resume_continues_the_file(run):
    history = opened(run, step=100)
    assert [r.step for r in history.records] == [0, 50, 100]
    append(history, record(150))
    assert lines(run / FILE_NAME) == [0, 50, 100, 150]
    assert [path.name for path in run.iterdir()] == [FILE_NAME]


def test_resume_from_an_older_checkpoint_keeps_the_abandoned_branch_aside(run, capsys):
    history = opened(run, step=50)
    assert [r.step for r in history.records] == [0, 50]
    assert lines(run / FILE_NAME) == [0, 50]
    assert lines(run / "mir_history.1.jsonl") == [0, 50, 100]
    assert str(run / "mir_history.1.jsonl") in capsys.readouterr().out


def test_a_new_run_in_the_same_folder_moves_the_old_history_aside_and_says_where(run, capsys):
    assert opened(run, step=0, probe_fingerprint="another").records == []
    assert lines(run / "mir_history.1.jsonl") == [0, 50, 100]
    assert (
        capsys.readouterr().out == f"[mir] Moved the history of an earlier run aside: {run / 'mir_history.1.jsonl'}\n"
    )
    append(opened(run, step=0), record(0))
    opened(run, step=0)
    assert lines(run / "mir_history.2.jsonl") == [0]


def test_resume_without_a_history_starts_one(tmp_path):
    assert opened(tmp_path, step=70).records == []


@pytest.mark.parametrize("field", DEFINITION)
def test_resume_refuses_values_made_differently_and_touches_nothing(run, field):
    before = (run / FILE_NAME).read_bytes()
    with pytest.raises(HistoryError, match=f"{field}.*other"):
        opened(run, step=100, **{field: "other"})
    assert (run / FILE_NAME).read_bytes() == before


def test_resume_with_another_prompt_names_both_and_an_older_history_goes_on_without(run):
    opened(run, step=100)
    append(opened(run, step=100, prompt="{image}{text}"), record(150, prompt="{image}{text}"))
    opened(run, step=150, prompt="{image}{text}")
    opened(run, step=150)
    with pytest.raises(
        HistoryError, match=r"prompt: it was '{image}{text}' at step 150 and is 'Q: {image} {text}' now"
    ):
        opened(run, step=150, prompt="Q: {image} {text}", tokens_fingerprint="other")


def test_a_line_without_its_end_is_dropped_and_kept_aside(run):
    with (run / FILE_NAME).open("a") as file:
        file.write('{"step": 150, "mi')
    history = opened(run, step=150)
    assert [r.step for r in history.records] == [0, 50, 100]
    append(history, record(200))
    assert lines(run / FILE_NAME) == [0, 50, 100, 200]


@pytest.mark.parametrize(
    "line",
    [
        "garbage",
        "[]",
        '{"step": 3}',
        '{"step": "3", "mir": 2}',
        '{"step": 3, "mir": NaN}',
        '{"step": 3, "mir": 1e400}',
        '{"step": 3, "mir": 1' + 400 * "0" + "}",
        '{"step": 3' + 400 * "0" + ', "mir": 2}',
        '{"step": 3, "mir": 2, "max_steps": 1e400}',
        '{"step": 3, "mir": 2, "own": ' + 90 * "[" + 90 * "]" + "}",
        '{"step": 3, "mir": 2, "loading": ' + 90 * '{"a": ' + "1" + 90 * "}" + "}",
        '{"step": 3, "mir": 2, "own": ' + 99999 * "[" + 99999 * "]" + "}",
    ],
    ids=lambda line: line[:40],
)
def test_error_names_the_line_when_it_is_damaged(run, line):
    content = (run / FILE_NAME).read_text().splitlines()
    content[1] = line
    (run / FILE_NAME).write_text("\n".join(content) + "\n")
    with pytest.raises(HistoryError, match=r"mir_history\.jsonl, line 2 "):
        opened(run, step=100)


def test_error_when_the_folder_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HistoryError, match="output_dir"):
        opened(tmp_path / "file" / "run")


def test_a_whole_last_line_without_newline_and_blank_lines_are_read(run):
    content = (run / FILE_NAME).read_text()
    (run / FILE_NAME).write_text("\n" + content.rstrip("\n"))
    assert [r.step for r in opened(run, step=100).records] == [0, 50, 100]


def test_error_when_the_history_is_no_text(run):
    (run / FILE_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(HistoryError, match="UTF-8"):
        opened(run, step=100)


def test_what_a_full_disk_refused_is_written_with_the_next_line(run, monkeypatch):
    history = opened(run, step=100)

    def full(_descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        append(history, record(150))
    monkeypatch.undo()
    append(history, record(200))
    assert lines(run / FILE_NAME) == [0, 50, 100, 150, 200]


def test_two_writers_of_one_file_are_noticed(run):
    first, second = opened(run, step=100), opened(run, step=100)
    append(first, record(150))
    with pytest.raises(HistoryError, match="mir_history"):
        append(second, record(150))
    assert lines(run / FILE_NAME) == [0, 50, 100, 150]


def test_what_is_not_finite_is_null_and_the_record_is_written(tmp_path):
    append(opened(tmp_path), record(0, mir_se=float("nan"), influences=[1.0, float("inf")], loss=float("inf")))
    (found,) = read_history(tmp_path / FILE_NAME)
    assert (found.mir, found.mir_se, found.influences, found.loss) == (2.0, None, None, None)


def test_unknown_fields_are_kept_when_a_history_is_continued(run):
    content = (run / FILE_NAME).read_text().replace('{"step":50,', '{"step":50,"their_own": [1, {"a": null}],')
    (run / FILE_NAME).write_text(content)
    assert opened(run, step=100).records[1].unknown == {"their_own": [1, {"a": None}]}
    assert json.loads((run / FILE_NAME).read_text().splitlines()[1])["their_own"] == [1, {"a": None}]


def test_numbers_of_unknown_fields_that_json_cannot_hold_become_null(run):
    (run / FILE_NAME).write_text('{"step": 0, "mir": 2.0, "own": [[1e400], {"a": 1e400}, 1]}\n')
    opened(run, step=0).write()
    (found,) = read_history(run / "mir_history.1.jsonl")
    assert found.unknown == {"own": [None, {"a": None}, 1]}
    assert json.loads(found.to_line())["own"] == [None, {"a": None}, 1]


def test_a_line_is_short_and_reads_as_the_record_in_memory():
    rng = np.random.default_rng(0)
    measured = {
        **pages.records(1, layers=80, samples=100)[0],
        "influences": [float(f"{value:.6g}") for value in rng.normal(0, 0.1, 100)],
        **{name: rng.integers(0, 999, 80).tolist() for name in ("vision_outliers", "text_outliers")},
    }
    record = EvalRecord.from_dict(shorten(measured))
    line = record.to_line()
    assert len(line) < 10_000
    assert EvalRecord.from_line(line) == record
    assert record.per_layer == measured["per_layer"]
    assert shorten(json.loads(line)) == json.loads(line)
