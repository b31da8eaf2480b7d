# SPDX-License-Identifier: Apache-2.0
"""The values of checkpoints, in a history file of their own: one record per step, sorted, written atomically."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from mir_callback import distributed
from mir_callback.errors import HistoryError
from mir_callback.fs import write_atomic
from mir_callback.history import read_history
from mir_callback.record import DESCRIBED_FIELDS, EvalRecord, read_definition

# Separate from `mir_history.jsonl`, which only the run itself writes.
RESULTS_NAME = "mir_eval.jsonl"
LOCK_SECONDS = 60.0  # a lock is needed for milliseconds; this long means a suspended process


class Results:
    """The records of one run's checkpoints, sorted by step; the same on every rank, written by rank 0.

    HistoryError on every rank if the file exists and is damaged or of another run. Ranks: collective.
    """

    def __init__(self, path: Path, run: Path) -> None:
        self.path = path
        self.problem: str | None = None  # on rank 0: why the file could not be locked
        self._run = os.path.relpath(run, path.parent)  # relative, so that the run can be moved
        with distributed.fail_together():
            records = self._read() if distributed.is_main() else []
        self.records = distributed.broadcast_object(records)

    def require_same_definition(self, definition: Mapping[str, str]) -> None:
        """HistoryError if a record has another value of one of DESCRIBED_FIELDS. Ranks: pure."""
        _require_same_definition(self.path, self.records, definition)

    def put(self, record: EvalRecord) -> EvalRecord:
        """Store a record, replacing one of the same step, and return it with its ``run`` set.

        The file is locked and read again, so records that other processes have added are kept. HistoryError on every
        rank if it cannot be written or has values of another definition by now. Ranks: collective.
        """
        record = replace(record, run=self._run)
        with distributed.fail_together():
            try:
                records = self._put(record) if distributed.is_main() else []
            except OSError as error:
                raise HistoryError(f"Could not write {self.path}: {error}. Choose another: --history FILE.") from error
        self.records = distributed.broadcast_object(records)
        return record

    def _put(self, record: EvalRecord) -> list[EvalRecord]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with lock(self.path) as self.problem:
            others = [other for other in self._read() if other.step != record.step]
            known = {n: value for n in DESCRIBED_FIELDS if (value := read_definition(record, n)) is not None}
            _require_same_definition(self.path, others, known)
            records = sorted([*others, record], key=lambda each: each.step)
            write_atomic(self.path, "".join(each.to_line() for each in records))
        return records

    def _read(self) -> list[EvalRecord]:
        try:
            records = read_history(self.path)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise HistoryError(f"Could not read {self.path}: {error}. Choose another: --history FILE.") from error
        for record in records:
            if record.run != self._run:
                raise HistoryError(
                    f"{self.path} has values of {record.run or 'a run, written in training'}, not of checkpoints of "
                    f"{self._run}. Choose another file: --history FILE."
                )
        return sorted(records, key=lambda each: each.step)


@contextmanager
def lock(path: Path, seconds: float = LOCK_SECONDS) -> Iterator[str | None]:
    """Lock a file, with `NAME.lock` beside it; the lock is released when the process ends in any way.

    Yields None, or why locking is not possible here. HistoryError if another process holds the lock.
    """
    file_lock = FileLock(f"{path}.lock", timeout=seconds)
    problem: str | None = None
    try:
        file_lock.acquire()
    except Timeout as error:
        raise HistoryError(
            f"Could not lock {path}: held by another process for {seconds:g} s. Find it with `fuser "
            f"{file_lock.lock_file}`, or choose another file: --history FILE."
        ) from error
    except (OSError, NotImplementedError) as error:  # a file system without locks, or another user's lock file
        problem = (
            f"could not lock {path} ({error}): do not write it with two mir eval at the same time, give each its own "
            "--history FILE"
        )
    try:
        yield problem
    finally:
        file_lock.release()


def _require_same_definition(path: Path, records: list[EvalRecord], definition: Mapping[str, str]) -> None:
    for name, value in definition.items():
        for record in records:
            known = read_definition(record, name)
            if known not in (None, value):
                raise HistoryError(
                    f"{path} has values with another {name}: it was {known!r} at step {record.step} and is "
                    f"{value!r} now. Use the same probe, processor, prompt and root, or another file: --history FILE."
                )
