# SPDX-License-Identifier: Apache-2.0
"""The history file: written line by line, continued on resume, never losing what was there."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mir_callback.console  # noqa: F401  # shows log lines, as in training
from mir_callback import lock
from mir_callback.analysis.load import read_run
from mir_callback.errors import HistoryError
from mir_callback.history import FILE_NAME, History, read_history
from mir_callback.record import EvalRecord, shorten
from tests.analysis import pages
from tests.logs import logged

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
    history.close()
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
    history.close()
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
        *('{"step": 3, "mir": 2, "per_layer": ' + depth * "[" + depth * "]" + "}" for depth in (800, 850, 900, 950)),
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


def test_a_second_run_in_the_folder_is_refused_and_touches_nothing(run):
    first = opened(run, step=100)
    for step in (0, 100):
        with pytest.raises(HistoryError, match="in use by another run of this process"):
            opened(run, step=step)
    append(first, record(150))
    first.close()
    assert lines(run / FILE_NAME) == [0, 50, 100, 150]
    assert [each.step for each in opened(run, step=150).records] == [0, 50, 100, 150]


HOLD = """
import os, sys, time
from tests.training.test_history import append, opened, record
history = opened(sys.argv[1])
append(history, record(0))
if os.fork() == 0:  # a data loader's worker, which outlives its trainer
    time.sleep(600)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def other_run(tmp_path):
    """A run of another process, with a forked child, in the folder `run`; both end with the test."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_another_process_is_named_and_its_folder_free_at_once_when_it_was_killed(other_run, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.2)
    with pytest.raises(HistoryError, match=rf"in use by another run \(pid {other_run.pid} on"):
        opened(tmp_path / "run", step=50)
    with pytest.raises(HistoryError):
        opened(tmp_path / "run")
    assert [each.step for each in read_run(tmp_path / "run").records] == [0]
    assert lines(tmp_path / "run" / FILE_NAME) == [0]
    other_run.kill()
    other_run.wait()
    assert [each.step for each in opened(tmp_path / "run", step=50).records] == [0]


def test_a_run_that_ended_in_an_error_holds_nothing(tmp_path):
    history = opened(tmp_path)
    cycle = [history]
    cycle.append(cycle)
    append(history, record(0))
    del history, cycle
    assert [each.step for each in opened(tmp_path, step=50).records] == [0]


@pytest.mark.parametrize("refusal", [OSError(errno.ENOLCK, "No locks available"), None], ids=["no locks", "no flock"])
def test_a_run_goes_on_with_a_warning_where_there_are_no_locks(tmp_path, monkeypatch, refusal):
    if refusal is None:
        monkeypatch.setattr(lock, "HAS_FLOCK", False)
    else:
        monkeypatch.setattr(lock, "flock", lambda *_: (_ for _ in ()).throw(refusal))
    with logged("could not lock .*(No locks available|no flock)") as found:
        history = opened(tmp_path)
        append(history, record(0))
        history.close()
    assert len(found) == 1
    assert lines(tmp_path / FILE_NAME) == [0]


def test_a_history_that_another_process_changes_stays_and_the_run_goes_on_in_a_file_of_its_own(run):
    history = opened(run, step=100)
    with (run / FILE_NAME).open("a") as file:
        file.write(record(120).to_line())
    with logged(r"changed by another process.*mir_history\.1\.jsonl") as found:
        append(history, record(150))
        append(history, record(200))
        history.close()
    assert len(found) == 1
    assert lines(run / FILE_NAME) == [0, 50, 100, 120]
    assert lines(history.path) == [0, 50, 100, 150, 200]
    assert history.path == run / "mir_history.1.jsonl"


def test_the_second_of_two_runs_in_a_folder_that_was_deleted_keeps_it(tmp_path):
    first = opened(tmp_path / "run")
    append(first, record(0))
    shutil.rmtree(tmp_path / "run")
    second = opened(tmp_path / "run")
    append(second, record(0, mir=1.5))
    with logged(r"in use by another run .*mir_history\.1\.jsonl"):
        append(first, record(50))
    append(second, record(50, mir=1.5))
    first.close()
    second.close()
    assert [each.mir for each in read_history(tmp_path / "run" / FILE_NAME)] == [1.5, 1.5]
    assert [each.mir for each in read_history(first.path)] == [2.0, 1.95]


def replace_by(path, kind):
    path.unlink(missing_ok=True)
    path.mkdir() if kind == "folder" else path.symlink_to(path.with_name("target"))


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_stands_in_the_place_of_the_history_is_not_written_to(run, kind):
    history = opened(run, step=100)
    (run / "target").write_text("theirs")
    replace_by(run / FILE_NAME, kind)
    with logged("not the file of this run any more"):
        append(history, record(150))
    assert (run / "target").read_text() == "theirs"
    assert lines(history.path) == [0, 50, 100, 150]


@pytest.mark.parametrize("step", [0, 100])
def test_a_history_that_is_a_link_is_read_and_not_written_through(run, step, capsys):
    target = run.parent / "elsewhere.jsonl"
    (run / FILE_NAME).rename(target)
    (run / FILE_NAME).symlink_to(target)
    history = opened(run, step=step)
    append(history, record(150))
    assert lines(target) == [0, 50, 100]
    assert not (run / FILE_NAME).is_symlink()
    assert lines(run / FILE_NAME) == ([150] if step == 0 else [0, 50, 100, 150])
    assert str(target) in capsys.readouterr().out or (run / "mir_history.1.jsonl").resolve() == target


def test_resume_is_refused_when_the_history_is_a_link_to_nothing(run):
    (run / FILE_NAME).unlink()
    (run / FILE_NAME).symlink_to(run / "gone")
    with pytest.raises(HistoryError, match="link to .*gone"):
        opened(run, step=100)
    assert not (run / "gone").exists()
    append(opened(run, step=0), record(0))
    assert not (run / "gone").exists()
    assert lines(run / FILE_NAME) == [0]


@pytest.mark.parametrize("step", [0, 100])
def test_resume_is_refused_when_the_history_is_a_pipe(run, step):
    (run / FILE_NAME).unlink()
    os.mkfifo(run / FILE_NAME)
    with pytest.raises(HistoryError, match="no regular file"):
        opened(run, step=step)


def test_a_link_where_the_lock_would_be_is_not_followed(tmp_path):
    (tmp_path / f"{FILE_NAME}.lock").symlink_to(tmp_path / "target")
    (tmp_path / "target").write_text("theirs")
    with logged("could not lock"):
        history = opened(tmp_path)
    append(history, record(0))
    history.close()
    assert (tmp_path / "target").read_text() == "theirs"
    assert (tmp_path / f"{FILE_NAME}.lock").is_symlink()


DEEDS = {
    "write": None,
    "delete file": lambda path: path.unlink(missing_ok=True),
    "move file": lambda path: path.exists() and path.replace(path.with_name("moved.jsonl")),
    "append junk": lambda path: path.exists() and path.write_bytes(path.read_bytes() + b"junk\n"),
    "truncate": lambda path: path.exists() and os.truncate(path, path.stat().st_size // 2),
    "edit": lambda path: path.exists() and path.write_bytes(path.read_bytes().replace(b"2", b"3")),
    "delete folder": lambda path: shutil.rmtree(path.parent, ignore_errors=True),
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(deeds=st.lists(st.sampled_from(sorted(DEEDS)), max_size=8))
def test_all_records_of_a_run_can_be_read_back_whatever_happens_to_its_file(tmp_path, deeds):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    history = opened(tmp_path / "run")
    append(history, record(0))
    for step, deed in enumerate(deeds, start=1):
        if deed == "write":
            append(history, record(step))
        else:
            DEEDS[deed](history.path)
    history.close()
    assert read_history(history.path) == history.records
    assert not (tmp_path / "run" / f"{FILE_NAME}.lock").exists()


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


@pytest.mark.parametrize("is_linked", [False, True])
def test_a_file_of_somebody_else_with_the_name_of_the_lock_stays(tmp_path, capsys, is_linked):
    path = tmp_path / f"{FILE_NAME}.lock"
    path.write_text("" if is_linked else "notes")
    if is_linked:
        os.link(path, tmp_path / "precious")
    history = opened(tmp_path)
    append(history, record(0))
    history.close()
    assert path.read_text() == ("" if is_linked else "notes")
    assert capsys.readouterr().err.count("could not lock") == 1
    assert lines(tmp_path / FILE_NAME) == [0]
