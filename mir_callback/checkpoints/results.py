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
    """The records of one run's checkpoints; the same on every rank, written by rank 0.

    Args:
        path: the history file; made with the first record.
        run: the run's folder; a file that holds another run's records is refused.

    Attributes:
        path: the file.
        records: what it holds, in order of steps.
        problem: why another process that writes the file at the same time may lose records; None if it cannot, and on
            other ranks.

    Raises:
        HistoryError: the file is damaged, is of another run, or cannot be read; on every rank.

    Ranks: collective.
    """

    def __init__(self, path: Path, run: Path) -> None:
        self.path = path
        self.problem: str | None = None
        self._run = os.path.relpath(run, path.parent)  # relative, so that both can be moved together
        records: list[EvalRecord] = []
        with distributed.fail_together():
            if distributed.is_main():
                records = self._read()
        self.records = distributed.broadcast_object(records)

    def require_same_definition(self, definition: Mapping[str, str]) -> None:
        """Refuse to put values made in different ways side by side.

        Args:
            definition: fields of DEFINITION_FIELDS as they are now, all or some.

        Raises:
            HistoryError: a record was made otherwise.

        Ranks: pure.
        """
        _require_same_definition(self.path, self.records, definition)

    def put(self, record: EvalRecord) -> EvalRecord:
        """Add a record in the place of its step; it takes that of an older one.

        What another process has written meanwhile stays: the file is locked over reading and writing.

        Returns:
            The record as the file has it, with the run it is of.

        Raises:
            HistoryError: it cannot be written, or another process has meanwhile put values in it that were made
                otherwise; on every rank.

        Ranks: collective.
        """
        record = replace(record, run=self._run)
        records: list[EvalRecord] = []
        with distributed.fail_together():
            if distributed.is_main():
                try:
                    records = self._put(record)
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

    Args:
        path: the file; its folder must exist.
        seconds: how long to wait for another process.

    Yields:
        None, or why there is no lock: then the block runs without one.

    Raises:
        HistoryError: another process keeps it.

    Ranks: any, one process each.
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
