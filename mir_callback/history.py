# SPDX-License-Identifier: Apache-2.0
"""The history file of a run: one evaluation per line, flushed to disk at once, continued on resume."""

from __future__ import annotations

import gc
import logging
import os
import stat
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from mir_callback import lock
from mir_callback.errors import HistoryError
from mir_callback.fs import free_name, require_file, write_atomic, write_beside, write_new
from mir_callback.record import DESCRIBED_FIELDS, EvalRecord, read_definition

FILE_NAME = "mir_history.jsonl"
_ROOTS = ("exact", "paper_fast")  # those of metric.frechet, whose import would load torch
_MOST_DAMAGED = 1000  # lines, after which it is no history
_LISTED = 3  # messages of one kind that are listed one by one

LayersOf = Callable[[Sequence[EvalRecord]], Iterable[EvalRecord]]

_log = logging.getLogger(__name__)


class _ForeignFileError(Exception):
    """The file of this run has become one of others."""


class History:
    """The records of one run; the same on every rank, written by rank 0.

    The folder is locked from :meth:`open` to :meth:`close`. What others do to the file meanwhile costs a warning and no
    record: a file that is gone or cut short is written again, and beside one with other contents, which stays, the
    history goes on under a free name.

    Attributes:
        records: the evaluations so far, newest last; append to them, then call :meth:`write`.
        path: the file; None before :meth:`open`. It changes, on rank 0, if the history goes on under another name.
    """

    def __init__(self) -> None:
        self.records: list[EvalRecord] = []
        self.path: Path | None = None
        self._lock: lock.RunLock | None = None  # on rank 0
        self._content = b""  # the complete lines in the file
        self._written = 0  # records that are in the file
        self._reach = 0  # bytes that the file may have after a write that failed
        self._is_open = False

    def open(self, folder: str | Path, start_step: int, definition: Mapping[str, str]) -> None:
        """Start or continue the history of a run.

        A run that starts at step 0 gets a new file; that of an earlier run is moved aside, to
        `mir_history.<n>.jsonl`. A resumed run continues the file up to ``start_step``; if there are later records, the
        file as it was is kept as such a copy. A link is read and not written through: a file takes its place.

        Args:
            folder: output folder of the run; created if it does not exist.
            start_step: 0, or the step of the checkpoint that training resumes from.
            definition: values of DESCRIBED_FIELDS for the evaluations to come.

        Raises:
            HistoryError: another run writes to the folder, the existing history has another definition or is damaged,
                or the folder cannot be written; on every rank.

        Ranks: collective.
        """
        from mir_callback import distributed  # imports torch, which reading a history does not need

        path = Path(folder) / FILE_NAME
        records: list[EvalRecord] = []
        with distributed.fail_together():
            if distributed.is_main():
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    problem = self._take(path)
                    records, self._content = _continue(path, start_step, definition)
                except BaseException as error:
                    self.release()
                    if not isinstance(error, OSError):
                        raise
                    raise HistoryError(
                        f"Could not write {path}: {error}. Make output_dir writable or choose another."
                    ) from error
                if problem is not None:
                    _log.warning("could not lock %s (%s): let no other run write there", path.parent, problem)
        self.path = path
        self.records = distributed.broadcast_object(records)
        self._written, self._reach, self._is_open = len(self.records), len(self._content), True

    def write(self) -> None:
        """Write the records that are not in the file yet, and flush them to disk.

        Raises:
            OSError: they could not be written (rank 0 only); the next call tries again, and so does :meth:`close`.

        Ranks: all.
        """
        if self._written < len(self.records):
            self._save()

    def close(self) -> None:
        """See that all records are on disk, and free the folder for another run.

        Raises:
            OSError: they could not be written (rank 0 only).

        Ranks: all.
        """
        try:
            if self.records and (self._is_open or self._written < len(self.records)):
                self._save()
            self._is_open = False
        finally:
            self.release()

    def release(self) -> None:
        """Free the folder for another run, at the end of this one or after an error. Ranks: all."""
        if self._lock is not None:
            self._lock.release()

    def _take(self, path: Path) -> str | None:
        """Lock the folder; why not, if there can be no lock."""
        folder = os.path.realpath(path.parent)
        self._lock = lock.RunLock(Path(folder) / f"{FILE_NAME}.lock")
        if _open_in(folder):
            gc.collect()  # a run that has failed may still lie about
        if _open_in(folder):
            raise HistoryError(
                f"{folder} is in use by another run of this process. Give each run its own output_dir; if the other "
                "one is over, end it with its monitor's close(evaluate=False)."
            )
        problem = self._lock.acquire(lock.PATIENCE)
        _OPEN.add(self)
        return problem

    def _save(self) -> None:
        """Bring the file up to date with the records."""
        from mir_callback import distributed

        if self.path is None or self._lock is None or not distributed.is_main():
            return
        lines = "".join(record.to_line() for record in self.records[self._written :]).encode()
        whole, path = self._content + lines, self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if path.name == FILE_NAME:
                self._lock.acquire()
            self._write(path, whole)
        except (_ForeignFileError, HistoryError) as error:  # or the folder was lost, and another run is in it now
            self._go_on_beside(whole, str(error))
        self._content, self._written, self._reach = whole, len(self.records), len(whole)

    def _write(self, path: Path, whole: bytes) -> None:
        """Make ``whole`` the content of the file; _ForeignFileError if it has lines of others."""
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            if self._content:
                _log.warning("%s was gone: wrote all %d evaluations of this run again", path, len(self.records))
            self._reach = len(whole)
            write_new(path, whole)
            return
        if not stat.S_ISREG(found.st_mode):
            raise _ForeignFileError(f"{path} is not the file of this run any more")
        flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags), "r+b") as file:
            there = file.read()
            is_torn = there.startswith(self._content) and len(there) <= self._reach
            if not is_torn and not whole.startswith(there):
                raise _ForeignFileError(f"{path} was changed by another process")
            if there == whole:
                return
            if len(there) < len(self._content):
                _log.warning("%s was cut short: wrote the evaluations of this run again", path)
            start = min(len(there), len(self._content))
            self._reach = len(whole)
            file.truncate(start)
            file.seek(start)
            file.write(whole[start:])
            file.flush()
            os.fsync(file.fileno())

    def _go_on_beside(self, whole: bytes, why: str) -> None:
        assert self.path is not None
        self.path = write_beside(self.path.with_name(FILE_NAME), whole)
        _log.warning(
            "%s. The history of this run goes on, with all its evaluations, in %s; to resume from it, rename it to %s. "
            "Give each run its own output_dir",
            *(why.rstrip("."), self.path, FILE_NAME),
        )

    def has_step(self, step: int) -> bool:
        """Whether the newest record belongs to ``step``."""
        return bool(self.records) and self.records[-1].step == step


def close_earlier(folder: str | Path) -> None:
    """Close the histories that this process has open in a folder: of runs that are over, but did not end in order.

    For whoever knows that they are over, as a Trainer that begins to train does. Ranks: all.
    """
    for history in _open_in(os.path.realpath(folder)):
        try:
            history.close()
        except OSError as error:
            _log.warning("could not write MIR of the run before to disk: %s", error)


def read_history(path: str | Path) -> list[EvalRecord]:
    """Read a history file in order to continue it; every line must be valid.

    Blank lines are skipped, and so is an incomplete last line, which a killed process may leave.

    Args:
        path: the `.jsonl` file.

    Returns:
        The records, oldest first.

    Raises:
        HistoryError: the file is no UTF-8 text, or a line is no valid record.
        OSError: the file cannot be read.

    Ranks: any.
    """
    _require_file(Path(path))
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise HistoryError(f"{path} is not UTF-8 text: {error}. Move it away to start a new history.") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(EvalRecord.from_line(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise HistoryError(
                f"{path}, line {number} is not a valid record: {error}. Repair or remove it: {line!r:.80}"
            ) from error
    return records


def read_records(path: str | Path, layers_of: LayersOf | None = None) -> tuple[list[EvalRecord], list[str]]:
    """Read a history file for analysis, skipping what is damaged.

    Unlike :func:`read_history` this skips damaged lines and fields instead of raising. Records are sorted by step; of
    several with the same step the last one counts.

    Args:
        path: the `.jsonl` file.
        layers_of: given the records, returns those whose values of layers are wanted, which are most of a file; of the
            others these are neither checked nor kept (``brief`` of :meth:`EvalRecord.from_dict`). Default: all.

    Returns:
        The records, and messages about what was skipped.

    Raises:
        HistoryError: the file cannot be read, or nearly nothing in it is a record.

    Ranks: pure.
    """
    try:
        _require_file(Path(path))
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            text = file.readlines()
    except OSError as error:
        raise HistoryError(f"Could not read {path}: {error.strerror or error}.") from error
    records: list[EvalRecord] = []
    line_of: dict[int, str] = {}
    lines: list[str] = []
    fields: list[str] = []
    for number, line in enumerate(text, start=1):
        if line.isspace():
            continue
        try:
            record, damage = _read_line(line, fields, brief=layers_of is not None)
        except ValueError as error:
            lines.append(f"skipped damaged line {number} ({error}): {line.strip()!r:.60}")
            if len(lines) > _MOST_DAMAGED:
                raise HistoryError(
                    f"{path} has more than {_MOST_DAMAGED} damaged lines. Is it another file?"
                ) from error
            continue
        lines += damage
        records.append(record)
        line_of[record.step] = line
    by_step = {record.step: record for record in records}  # the last one of each
    for record in layers_of([by_step[step] for step in sorted(by_step)]) if layers_of else ():
        by_step[record.step], damage = _read_line(line_of[record.step], fields, brief=False)
        lines += damage
    fields = list(dict.fromkeys(fields))
    messages = [*_first_few(lines, "damaged lines"), *_first_few(fields, "damaged fields")]
    steps = [record.step for record in records]
    if steps != sorted(steps):
        messages.append("records were not in order of steps; sorted them")
    if len(by_step) < len(records):
        messages.append(f"skipped {len(records) - len(by_step)} records that a later one of the same step replaces")
    unknown = sorted({record.root for record in records if record.root is not None} - {*_ROOTS})
    if unknown:
        messages.append(
            f"unknown root {', '.join(map(repr, unknown))} (known: {', '.join(_ROOTS)}): not comparable with others"
        )
    return [by_step[step] for step in sorted(by_step)], messages


def _read_line(line: str, fields: list[str], *, brief: bool) -> tuple[EvalRecord, list[str]]:
    """A record, without the values of its layers if the line is damaged only there, and a message in that case.

    So its MIR counts in any case, as most commands don't even parse these values.
    """
    try:
        return EvalRecord.from_line(line, fields, brief=brief), []
    except ValueError as error:
        if brief:
            raise
        record = EvalRecord.from_line(line, fields, brief=True)
        return record, [f"step {record.step}: ignored the values of its layers ({error})"]


def _require_file(path: Path) -> None:
    try:
        require_file(path)
    except ValueError as error:
        raise HistoryError(str(error)) from error


def _first_few(messages: list[str], kind: str) -> list[str]:
    more = len(messages) - _LISTED
    return messages if more <= 0 else [*messages[:_LISTED], f"skipped {more} more {kind}"]


_OPEN: weakref.WeakSet[History] = weakref.WeakSet()  # those of this process that may hold a lock


def _open_in(folder: str) -> list[History]:
    locks = [(history, history._lock) for history in _OPEN]
    return [history for history, held in locks if held and held.is_held() and str(held.path.parent) == folder]


def _continue(path: Path, start_step: int, definition: Mapping[str, str]) -> tuple[list[EvalRecord], bytes]:
    """The records that a run continues, and the content of its file."""
    if start_step == 0 and os.path.lexists(path) and (path.is_symlink() or path.stat().st_size > 0):
        aside = free_name(path)
        os.replace(path, aside)
        _log.info("Moved the history of an earlier run aside: %s", aside)
    if not os.path.lexists(path):
        write_new(path, b"")
    if not path.is_file():
        what = f"a link to {os.readlink(path)}, where no file is" if path.is_symlink() else "no regular file"
        raise HistoryError(f"{path} is {what}. Move it away to start a new history.")
    found = read_history(path)
    _check_definition(path, found, definition)
    kept = [record for record in found if record.step <= start_step]
    content = "".join(record.to_line() for record in kept).encode()
    there = path.read_bytes()
    if path.is_symlink():
        _log.info("%s was a link to %s, which stays as it is: the history goes on in a file", path, os.readlink(path))
        write_atomic(path, content)
    elif content != there:
        copy = write_beside(path, there)
        write_atomic(path, content)
        if len(kept) < len(found):
            words = "Resuming at step %d: removed %d later evaluations from the history, which is kept in full as %s"
            _log.info(words, start_step, len(found) - len(kept), copy)
    return kept, content


def _check_definition(path: Path, records: list[EvalRecord], definition: Mapping[str, str]) -> None:
    for field in DESCRIBED_FIELDS:
        for record in records:
            known = read_definition(record, field)
            if field in definition and known not in (None, definition[field]):
                raise HistoryError(
                    f"Cannot continue {path} with another {field}: it was {known!r} at step {record.step} and "
                    f"is {definition[field]!r} now. Use the same probe (Probe.save, Probe.load), processor, prompt, "
                    "root and options, or move the file away to start a new history."
                )
