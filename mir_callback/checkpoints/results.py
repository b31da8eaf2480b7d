# SPDX-License-Identifier: Apache-2.0
"""Values of checkpoints in a history file of their own: one record a step, in order of steps, whole at every moment."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mir_callback import distributed as collectives
from mir_callback.errors import HistoryError
from mir_callback.history import DEFINITION_FIELDS, Record, read_history

try:
    import fcntl
except ImportError:  # where there is no flock, as on Windows
    fcntl = None  # type: ignore[assignment]

PATIENCE_SECONDS = 60.0  # it is held for milliseconds; longer means a process that was stopped
_WAIT_SECONDS = 0.02


@contextmanager
def locked(path: Path, patience: float = PATIENCE_SECONDS) -> Iterator[str | None]:
    """Hold a file's lock, a file `NAME.lock` beside it, which stays: taken away it would not be the same lock for all.

    A process that ends, however it does, lets go of it.

    Args:
        path: the file; its folder must exist.
        patience: seconds to wait for another process.

    Yields:
        None, or why there is no lock: then the block runs without one.

    Raises:
        HistoryError: another process does not let go of it.

    Ranks: any, one process each.
    """
    beside = path.with_name(f"{path.name}.lock")
    try:
        if fcntl is None:
            raise OSError("this system has no flock")
        descriptor = _open(beside)
    except OSError as error:
        yield _unlocked(path, error)
        return
    try:
        problem: str | None = None
        try:
            _wait(descriptor, beside, patience)
        except OSError as error:
            problem = _unlocked(path, error)
        yield problem
    finally:
        os.close(descriptor)  # and so lets go


def _open(beside: Path) -> int:
    """A file to lock; another user's may be readable only, which is enough on a disk of this machine."""
    try:
        return os.open(beside, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        return os.open(beside, os.O_RDONLY)


def _wait(descriptor: int, beside: Path, patience: float) -> None:
    until = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= until:
                raise HistoryError(
                    f"{beside} must be let go of by another process, got none in {patience:g} s; see which holds it "
                    f"(fuser {beside}), or choose another file: --history FILE"
                ) from error
            time.sleep(_WAIT_SECONDS)


def _unlocked(path: Path, error: OSError) -> str:
    return (
        f"{path} is written without a lock ({error}): a second mir eval that writes it at the same time may lose "
        "records; run one after the other, or give each its own --history FILE"
    )


# Not `mir_history*.jsonl`: what a run has measured itself stays as it is.
RESULTS_NAME = "mir_eval.jsonl"


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
        # Relative, so that both can be moved together.
        self.run = os.path.relpath(run, path.parent)
        self.problem: str | None = None
        records: list[Record] = []
        with collectives.all_or_none():
            if collectives.is_main():
                records = self._read()
        self.records = collectives.broadcast_object(records)

    def of_step(self, step: int) -> Record | None:
        """The record of a step."""
        return next((record for record in self.records if record["step"] == step), None)

    def require_same_definition(self, **definition: str) -> None:
        """Refuse to put values made in different ways side by side.

        Args:
            **definition: fields of DEFINITION_FIELDS as they are now, all or some.

        Raises:
            HistoryError: a record was made otherwise.

        Ranks: pure.
        """
        self._check_definition(self.records, definition)

    def _check_definition(self, records: list[Record], definition: Mapping[str, str]) -> None:
        for record in records:
            for field, value in definition.items():
                if field in DEFINITION_FIELDS and record.get(field, value) != value:
                    raise HistoryError(
                        f"{field} must be that of the values in {self.path}, got {value} but {record[field]} at step "
                        f"{record['step']}; measure with the same probe, processor and root, or into another file: "
                        "--history FILE"
                    )

    def put(self, record: Record) -> None:
        """Add a record in the place of its step; it takes that of an older one.

        What another process has written meanwhile stays: the file is locked over reading and writing, by a file
        `NAME.lock` beside it that is left there.

        Raises:
            HistoryError: it cannot be written, or another process has meanwhile put values in it that were made
                otherwise; on every rank.

        Ranks: collective.
        """
        records: list[Record] = []
        with collectives.all_or_none():
            if collectives.is_main():
                try:
                    records = self._put(record)
                except OSError as error:
                    raise HistoryError(
                        f"{self.path} must be a file that can be written, got {error}; choose another: --history FILE"
                    ) from error
        self.records = collectives.broadcast_object(records)

    def _put(self, record: Record) -> list[Record]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path) as problem:
            self.problem = problem
            others = [other for other in self._read() if other["step"] != record["step"]]
            self._check_definition(others, {name: record[name] for name in DEFINITION_FIELDS if name in record})
            records = _in_order([*others, {**record, "run": self.run}])
            self._write(records)
        return records

    def _read(self) -> list[Record]:
        if not self.path.exists():
            return []
        try:
            records = read_history(self.path)
        except OSError as error:
            raise HistoryError(
                f"{self.path} must be a history file, got {error}; choose another: --history FILE"
            ) from error
        for record in records:
            self._check_run(record)
        return _in_order(records)

    def _check_run(self, record: Mapping[str, object]) -> None:
        if record.get("run") != self.run:
            whose = f"{record['run']}" if record.get("run") else "a run that measures itself"
            raise HistoryError(
                f"{self.path} must hold values of checkpoints of {self.run} only, got some of {whose}; "
                "choose another file: --history FILE"
            )

    def _write(self, records: list[Record]) -> None:
        """Written beside and renamed: a reader, or a process that was killed, never sees half of it."""
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
        try:
            with beside.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.path)
        finally:
            beside.unlink(missing_ok=True)


def _in_order(records: list[Record]) -> list[Record]:
    return sorted(records, key=lambda record: int(record["step"]))
