# SPDX-License-Identifier: Apache-2.0
"""The file of a run's evaluations: one record a line, on the disk as soon as it is made, continued on resume."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from mir_callback.errors import HistoryError
from mir_callback.fs import free_name, write_atomic
from mir_callback.record import DEFINITION_FIELDS, EvalRecord

FILE_NAME = "mir_history.jsonl"
_ROOTS = ("exact", "paper_fast")  # those of metric.frechet, which would bring torch along
_LISTED = 3  # findings of one kind that are said one by one


class History:
    """Records of one run, newest last; the same on every rank, written by rank 0.

    Attributes:
        records: the evaluations so far.
        path: the file; None until it is open.
    """

    def __init__(self) -> None:
        self.records: list[EvalRecord] = []
        self.path: Path | None = None
        self._size = 0  # bytes of whole lines written or continued
        self._torn = False
        self._written = 0  # records that are in the file

    def open(self, folder: str | Path, start_step: int, definition: Mapping[str, str]) -> None:
        """Start or continue the history of a run.

        At step 0 a new history starts; a file of an earlier run is moved aside, to `mir_history.<n>.jsonl`. Later
        the existing file is continued: records after ``start_step`` belong to a branch of the run that is not
        continued, and stay in a copy moved aside. ``definition`` says how values are made now, by DEFINITION_FIELDS.

        Raises:
            HistoryError: the existing history was made with another probe or definition, is damaged, or the folder
                cannot be written; on every rank.

        Ranks: collective.
        """
        from mir_callback import distributed  # brings torch along, which readers of a history do without

        path = Path(folder) / FILE_NAME
        records: list[EvalRecord] = []
        with distributed.fail_together():
            if distributed.is_main():
                try:
                    records = _continue(path, start_step, definition)
                    self._size = path.stat().st_size
                except OSError as error:
                    raise HistoryError(
                        f"cannot write {FILE_NAME}: {path}: {error}; make output_dir writable or choose another"
                    ) from error
        self.path = path
        self.records = distributed.broadcast_object(records)
        self._torn, self._written = False, len(self.records)

    def append(self, record: EvalRecord) -> None:
        """Add a record and :meth:`write` it. Ranks: all."""
        self.records.append(record)
        self.write()

    def write(self) -> None:
        """Have rank 0 write the records that are not in the file yet, and flush them to the disk before going on.

        Raises:
            OSError: they could not be written (rank 0 only); the next call tries again.
            HistoryError: someone else writes the same file (rank 0 only).

        Ranks: all.
        """
        from mir_callback import distributed

        if self.path is None or not distributed.is_main() or self._written == len(self.records):
            return
        lines = "".join(record.to_line() for record in self.records[self._written :]).encode()
        with self.path.open("r+b") as file:
            size = file.seek(0, os.SEEK_END)
            if size != self._size and not self._torn:
                raise HistoryError(
                    f"somebody else writes {self.path}: it has {size} bytes where this run has written {self._size}; "
                    "give each run an output_dir of its own, and a Trainer one MIRCallback"
                )
            self._torn = True  # until the lines are whole, what lies behind the last whole one is debris
            file.truncate(self._size)
            file.seek(self._size)
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
            self._torn = False
            self._size, self._written = self._size + len(lines), len(self.records)

    def has_step(self, step: int) -> bool:
        """Whether the newest record belongs to ``step``."""
        return bool(self.records) and self.records[-1].step == step


def read_history(path: str | Path) -> list[EvalRecord]:
    """Read a history file to continue or judge it; every line has to be right.

    Blank lines are passed over. A last line that is not whole, as a killed process leaves it, is dropped.

    Args:
        path: the `.jsonl` file.

    Returns:
        The records, oldest first.

    Raises:
        HistoryError: not a text file, or a line is no record; the message names the line.

    Ranks: any.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise HistoryError(f"{path} is no UTF-8 text: {error}; move it away to start a new history") from error
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
                f"{path}, line {number} is no record with step and mir: {error}, got {line!r:.80}; repair or remove "
                "that line"
            ) from error
    return records


def read_records(path: str | Path) -> tuple[list[EvalRecord], list[str]]:
    """Read a history file of any origin, as far as it can be read.

    Unlike :func:`read_history`, which a run is continued from, this leaves out damaged lines wherever they stand, and
    fields that break their rule. Steps are put in order; of several records of one step the last one counts.

    Returns:
        Records by increasing step; and what was found wrong, in sentences, the first ones of each kind.

    Raises:
        HistoryError: there is no such file, or it cannot be read.

    Ranks: pure.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise HistoryError(f"the history {path} cannot be read: {error.strerror or error}") from error
    records: list[EvalRecord] = []
    lines: list[str] = []
    fields: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(EvalRecord.from_line(line, fields))
        except ValueError as error:
            lines.append(f"line {number} is left out, it is no record ({error}): {line.strip()!r:.60}")
    messages = [*_first_few(lines, "damaged lines"), *_first_few(fields, "damaged fields")]
    by_step = {record.step: record for record in records}  # the last one of each
    steps = [record.step for record in records]
    if steps != sorted(steps):
        messages.append("its steps do not increase; they are put in order")
    if len(by_step) < len(records):
        messages.append(f"{len(records) - len(by_step)} records are left out, a later one has the same step")
    unknown = sorted({record.root for record in records if record.root is not None} - {*_ROOTS})
    if unknown:
        messages.append(
            f"root {', '.join(map(repr, unknown))} is unknown here (known: {', '.join(_ROOTS)}); such values are like "
            "none of another root"
        )
    return [by_step[step] for step in sorted(by_step)], messages


def _first_few(findings: list[str], kind: str) -> list[str]:
    more = len(findings) - _LISTED
    return findings if more <= 0 else [*findings[:_LISTED], f"{more} more {kind} are left out"]


def _continue(path: Path, start_step: int, definition: Mapping[str, str]) -> list[EvalRecord]:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.touch()
        return []
    if start_step == 0:
        if path.stat().st_size > 0:
            os.replace(path, free_name(path))
        path.touch()
        return []
    found = read_history(path)
    _check_definition(path, found, definition)
    kept = [record for record in found if record.step <= start_step]
    content = "".join(record.to_line() for record in kept)
    if content != path.read_text(encoding="utf-8"):
        shutil.copy2(path, free_name(path))
        write_atomic(path, content)
    return kept


def _check_definition(path: Path, records: list[EvalRecord], definition: Mapping[str, str]) -> None:
    for record in records:
        for field in DEFINITION_FIELDS:
            if record[field] not in (None, definition[field]):
                raise HistoryError(
                    f"cannot continue {path} with another {field}: it has {record[field]} at step {record.step}, now "
                    f"it is {definition[field]}; use the same probe, processor and root (Probe.save and Probe.load), "
                    "or move the file away to start a new history"
                )
