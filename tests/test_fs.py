# SPDX-License-Identifier: Apache-2.0
"""What is written into a run's folder follows no link that somebody has put there; reading what they put ends."""

import os
import re
import secrets
from pathlib import Path

import pytest

from mir_callback import Probe
from mir_callback.analysis.load import read_run
from mir_callback.best_model import NOTE_NAME
from mir_callback.checkpoints.discover import find_checkpoints, read_json
from mir_callback.checkpoints.evaluate import LiveValues
from mir_callback.checkpoints.results import RESULTS_NAME, Results
from mir_callback.errors import MIRError
from mir_callback.fs import free_name, write_atomic, write_beside, write_new
from mir_callback.history import FILE_NAME
from mir_callback.probe.storage import RUN_PROBE
from mir_callback.record import EvalRecord
from tests.samples import pairs

WRITERS = {
    "mir_report.html": lambda path: write_atomic(path, "ours"),
    RUN_PROBE: lambda path: Probe.from_pairs(pairs(1)).save(path),
    RESULTS_NAME: lambda path: Results(path, path.parent).put(EvalRecord(step=1, mir=2.0)),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_in_the_place_of_a_file_is_replaced_and_its_target_stays(tmp_path, name, is_there):
    target = tmp_path / "elsewhere"
    if is_there:
        target.write_text("")  # what a probe's or a result's reader takes or refuses is not the question
        Probe.from_pairs(pairs(2)).save(tmp_path / "probe.zip")
        if name == RUN_PROBE:
            target = tmp_path / "probe.zip"
    before = target.read_bytes() if is_there else None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(target)
    WRITERS[name](tmp_path / "run" / name)
    assert not (tmp_path / "run" / name).is_symlink()
    assert (target.read_bytes() if target.exists() else None) == before


def test_a_link_with_the_name_of_the_temporary_file_is_not_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(secrets, "token_hex", lambda _size: "guessed")
    monkeypatch.setattr("os.getpid", lambda: 1)
    (tmp_path / ".page.1.guessed.new").symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "page", "ours")
    assert not (tmp_path / "target").exists()


def test_a_link_to_nothing_takes_a_name(tmp_path):
    (tmp_path / "a.1.txt").symlink_to(tmp_path / "target")
    assert free_name(tmp_path / "a.txt") == tmp_path / "a.2.txt"
    assert write_beside(tmp_path / "a.txt", "ours").read_text() == "ours"
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a.1.txt", "ours")
    assert not (tmp_path / "target").exists()


def test_nothing_is_left_of_a_file_that_could_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _descriptor: (_ for _ in ()).throw(OSError("no space left")))
    for write in (write_new, write_atomic, write_beside):
        with pytest.raises(OSError, match="no space left"):
            write(tmp_path / "a.txt", "ours")
    assert list(tmp_path.iterdir()) == []


READERS = {
    NOTE_NAME: (read_run, find_checkpoints),
    "trainer_state.json": (read_run, find_checkpoints),
    "config.json": (lambda folder: read_json(folder / "config.json"),),
    RESULTS_NAME: (lambda folder: Results(folder / RESULTS_NAME, folder),),
}


def put_pipe(path):
    os.mkfifo(path)


def put_device(path):
    path.symlink_to("/dev/zero")


def put_giant(path):
    path.touch()
    os.truncate(path, 2**34)  # takes no room on the disk


@pytest.mark.parametrize("put", [put_pipe, put_device, put_giant])
@pytest.mark.parametrize("name", READERS)
def test_files_whose_reading_would_not_end_are_refused_unread(tmp_path, monkeypatch, name, put):
    monkeypatch.setattr(Path, "read_text", lambda path, **_: pytest.fail(f"opened {path}"))
    put(tmp_path / name)
    for read in READERS[name]:
        with pytest.raises(MIRError, match=re.escape(tmp_path.name)):
            read(tmp_path)


@pytest.mark.parametrize("put", [put_pipe, put_device, put_giant])
def test_the_values_of_a_run_are_left_out_if_their_file_cannot_be_read_as_a_whole(tmp_path, put):
    put(tmp_path / FILE_NAME)
    assert FILE_NAME in LiveValues(tmp_path).problem
