# SPDX-License-Identifier: Apache-2.0
"""Values of checkpoints in a history file of their own: one record a step, in order of steps, whole at every moment."""

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
from mir_callback.record import DEFINITION_FIELDS, EvalRecord

# Not `mir_history*.jsonl`: what a run has measured itself stays as it is.
RESULTS_NAME = "mir_eval.jsonl"
LOCK_SECONDS = 60.0  # it is locked for milliseconds; longer means a process that was stopped


class Results:
    """The records of one run's checkpoints in order of steps; the same on every rank, written by rank 0.

    HistoryError on every rank if the file, which is made with the first record, is damaged, is of another run, or
    cannot be read. Ranks: collective.
    """

    def __init__(self, path: Path, run: Path) -> None:
        self.path = path
        self.problem: str | None = None  # on rank 0: why others that write the file at the same time may lose records
        self._run = os.path.relpath(run, path.parent)  # relative, so that both can be moved together
        with distributed.fail_together():
            records = self._read() if distributed.is_main() else []
        self.records = distributed.broadcast_object(records)

    def require_same_definition(self, definition: Mapping[str, str]) -> None:
        """HistoryError if a record was made otherwise than some of DEFINITION_FIELDS are now. Ranks: pure."""
        _require_same_definition(self.path, self.records, definition)

    def put(self, record: EvalRecord) -> EvalRecord:
        """Add a record in the place of its step, where it replaces an older one; as the file has it, with its run.

        What another process has written meanwhile stays: the file is locked over reading and writing. HistoryError on
        every rank if it cannot be written, or now holds values that were made otherwise. Ranks: collective.
        """
        record = replace(record, run=self._run)
        with distributed.fail_together():
            try:
                records = self._put(record) if distributed.is_main() else []
            except OSError as error:
                raise HistoryError(f"cannot write {self.path}: {error}; choose another: --history FILE") from error
        self.records = distributed.broadcast_object(records)
        return record

    def _put(self, record: EvalRecord) -> list[EvalRecord]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with lock(self.path) as self.problem:
            others = [other for other in self._read() if other.step != record.step]
            known = {name: record[name] for name in DEFINITION_FIELDS if record[name] is not None}
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
            raise HistoryError(f"cannot read {self.path}: {error}; choose another: --history FILE") from error
        for record in records:
            if record.run != self._run:
                raise HistoryError(
                    f"{self.path} holds values of {record.run or 'a run that measures itself'}, and these are of "
                    f"checkpoints of {self._run}; choose another file: --history FILE"
                )
        return sorted(records, key=lambda each: each.step)


@contextmanager
def lock(path: Path, seconds: float = LOCK_SECONDS) -> Iterator[str | None]:
    """Hold a file's lock, `NAME.lock` beside it; a process that ends, however it does, gives it back.

    Yields why the block runs without one, None if it has it; HistoryError if another process keeps it.
    """
    file_lock = FileLock(f"{path}.lock", timeout=seconds)
    problem: str | None = None
    try:
        file_lock.acquire()
    except Timeout as error:
        raise HistoryError(
            f"Could not lock {path}: held by another process for {seconds:g} s. See which (fuser "
            f"{file_lock.lock_file}), or choose another file: --history FILE"
        ) from error
    except (OSError, NotImplementedError) as error:  # a file system without locks, or another user's lock file
        problem = (
            f"{path} is written without a lock ({error}): a second mir eval that writes it at the same time may lose "
            "records; run one after the other, or give each its own --history FILE"
        )
    try:
        yield problem
    finally:
        file_lock.release()


def _require_same_definition(path: Path, records: list[EvalRecord], definition: Mapping[str, str]) -> None:
    for record in records:
        for name, value in definition.items():
            if record[name] not in (None, value):
                raise HistoryError(
                    f"{path} holds values made otherwise: with {name} {record[name]} at step {record.step}, now "
                    f"{value}; measure with the same probe, processor and root, or into another file: --history FILE"
                )
