# SPDX-License-Identifier: Apache-2.0
"""Records of a run's checkpoints in one file, that several processes write at the same time."""

import multiprocessing
import subprocess
import sys
import time

import filelock
import pytest

from mir_callback.checkpoints.results import RESULTS_NAME, Results, lock
from mir_callback.errors import HistoryError
from mir_callback.history import read_history
from mir_callback.record import EvalRecord
from tests.distributed.launch import run_process

COUNT = 60
HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""
WITHOUT_FLOCK = """
import sys
sys.modules["fcntl"] = None
from pathlib import Path
from mir_callback.checkpoints.results import Results
from mir_callback.record import EvalRecord
run = Path(sys.argv[1])
results = Results(run / "mir_eval.jsonl", run)
results.put(EvalRecord(step=2, mir=1.0))
print(results.problem)
"""


def record(step, probe="p", **fields):
    return EvalRecord(step=step, mir=1.0, probe_fingerprint=probe, **fields)


def put_many(run, first, ready, start):
    results = Results(run / RESULTS_NAME, run)
    ready.release()
    start.wait()
    for step in range(first, 2 * COUNT, 2):
        results.put(record(step, influences=[0.1] * 100))


def test_no_record_is_lost_when_two_processes_write_one_file(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, start = context.Semaphore(0), context.Event()
    processes = [context.Process(target=put_many, args=(tmp_path, first, ready, start)) for first in (0, 1)]
    for process in processes:
        process.start()
    for _ in processes:
        assert ready.acquire(timeout=120)
    start.set()
    for process in processes:
        process.join(timeout=120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [each.step for each in read_history(tmp_path / RESULTS_NAME)] == list(range(2 * COUNT))
    assert {path.name for path in tmp_path.iterdir()} <= {RESULTS_NAME, f"{RESULTS_NAME}.lock"}


def test_values_made_otherwise_are_refused_when_another_process_put_some_meanwhile(tmp_path):
    first, second = (Results(tmp_path / RESULTS_NAME, tmp_path) for _ in range(2))
    first.put(record(2))
    with pytest.raises(HistoryError, match="probe_fingerprint: it was 'p' at step 2 and is 'q'"):
        second.put(record(4, probe="q"))
    second.put(record(4))
    assert [each.step for each in read_history(tmp_path / RESULTS_NAME)] == [2, 4]


def test_lock_is_waited_for_and_is_free_again_when_its_process_was_killed(tmp_path):
    path = tmp_path / RESULTS_NAME
    command = [sys.executable, "-c", HOLD, str(tmp_path / f"{RESULTS_NAME}.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            started = time.monotonic()
            with pytest.raises(HistoryError, match=r"mir_eval\.jsonl: held by another process for 0\.2 s"):
                with lock(path, seconds=0.2):
                    pytest.fail("this is another process's")
            assert time.monotonic() - started >= 0.2
        finally:
            process.kill()
        process.wait()
    with lock(path, seconds=10.0) as problem:
        assert problem is None


def test_records_are_written_and_the_danger_is_told_when_there_can_be_no_lock(tmp_path):
    (tmp_path / f"{RESULTS_NAME}.lock").mkdir()
    results = Results(tmp_path / RESULTS_NAME, tmp_path)
    assert results.problem is None
    results.put(record(2))
    assert "could not lock" in results.problem
    assert "Is a directory" in results.problem
    assert [each.step for each in read_history(results.path)] == [2]


def test_records_are_written_and_the_danger_is_told_when_the_file_system_has_no_locks(tmp_path, monkeypatch):
    def refuse(self):  # as older versions of filelock do
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    results = Results(tmp_path / RESULTS_NAME, tmp_path)
    results.put(record(2))
    assert "FileSystem does not appear to support flock" in results.problem
    assert [each.step for each in read_history(results.path)] == [2]


def test_records_are_written_under_a_lock_when_the_system_has_no_flock(tmp_path):
    done = run_process(["-c", WITHOUT_FLOCK, str(tmp_path)])
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
    assert [each.step for each in read_history(tmp_path / RESULTS_NAME)] == [2]
