# SPDX-License-Identifier: Apache-2.0
"""The history file of a run: one evaluation per line, flushed to disk at once, continued on resume."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from mir_callback.errors import HistoryError
from mir_callback.fs import free_name, write_atomic
from mir_callback.record import DESCRIBED_FIELDS, EvalRecord

FILE_NAME = "mir_history.jsonl"
_ROOTS = ("exact", "paper_fast")  # those of metric.frechet, whose import would load torch
MAX_BYTES = 2**30  # of a file, which is read as a whole
_LISTED = 3  # messages of one kind that are listed one by one

LayersOf = Callable[[Sequence[EvalRecord]], Iterable[EvalRecord]]

_log = logging.getLogger(__name__)


class History:
    """The records of one run; the same on every rank, written by rank 0.

    Attributes:
        records: the evaluations so far, newest last; append to them, then call :meth:`write`.
        path: the file; None before :meth:`open`.
    """

    def __init__(self) -> None:
        self.records: list[EvalRecord] = []
        self.path: Path | None = None
        self._size = 0  # bytes of the complete lines in the file
        self._torn = False  # whether a write has failed, which may have left part of a line
        self._written = 0  # records that are in the file

    def open(self, folder: str | Path, start_step: int, definition: Mapping[str, str]) -> None:
        """Start or continue the history of a run.

        A run that starts at step 0 gets a new file; that of an earlier run is moved aside, to
        `mir_history.<n>.jsonl`. A resumed run continues the file up to ``start_step``; if there are later records, the
        file as it was is kept as such a copy.

        Args:
            folder: output folder of the run; created if it does not exist.
            start_step: 0, or the step of the checkpoint that training resumes from.
            definition: values of DESCRIBED_FIELDS for the evaluations to come.

        Raises:
            HistoryError: the existing history has another definition or is damaged, or the folder cannot be written;
                on every rank.

        Ranks: collective.
        """
        from mir_callback import distributed  # imports torch, which reading a history does not need

        path = Path(folder) / FILE_NAME
        records: list[EvalRecord] = []
        with distributed.fail_together():
            if distributed.is_main():
                try:
                    records = _continue(path, start_step, definition)
                    self._size = path.stat().st_size
                except OSError as error:
                    raise HistoryError(
                        f"Could not write {path}: {error}. Make output_dir writable or choose another."
                    ) from error
        self.path = path
        self.records = distributed.broadcast_object(records)
        self._torn, self._written = False, len(self.records)

    def write(self) -> None:
        """Write the records that are not in the file yet, and flush them to disk.

        Raises:
            OSError: they could not be written (rank 0 only); the next call tries again.
            HistoryError: another process has written to the file (rank 0 only).

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
                    f"{self.path} was changed by another process: it has {size} bytes, this run has written "
                    f"{self._size}. Give each run its own output_dir, and a Trainer only one MIRCallback."
                )
            self._torn = True
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
    _require_size(Path(path))
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
        HistoryError: the file cannot be read.

    Ranks: pure.
    """
    try:
        _require_size(Path(path))
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
            records.append(EvalRecord.from_line(line, fields, brief=layers_of is not None))
            line_of[records[-1].step] = line
        except ValueError as error:
            lines.append(f"skipped damaged line {number} ({error}): {line.strip()!r:.60}")
    by_step = {record.step: record for record in records}  # the last one of each
    for record in layers_of([by_step[step] for step in sorted(by_step)]) if layers_of else ():
        try:
            by_step[record.step] = EvalRecord.from_line(line_of[record.step], fields)
        except ValueError as error:
            lines.append(f"step {record.step}: ignored the values of its layers ({error})")
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


def _require_size(path: Path) -> None:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise HistoryError(f"{path} has {size} bytes, no history has more than {MAX_BYTES}. Is it another file?")


def _first_few(messages: list[str], kind: str) -> list[str]:
    more = len(messages) - _LISTED
    return messages if more <= 0 else [*messages[:_LISTED], f"skipped {more} more {kind}"]


def _continue(path: Path, start_step: int, definition: Mapping[str, str]) -> list[EvalRecord]:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.touch()
        return []
    if start_step == 0:
        if path.stat().st_size > 0:
            aside = free_name(path)
            os.replace(path, aside)
            _log.info("Moved the history of an earlier run aside: %s", aside)
        path.touch()
        return []
    found = read_history(path)
    _check_definition(path, found, definition)
    kept = [record for record in found if record.step <= start_step]
    content = "".join(record.to_line() for record in kept)
    if content != path.read_text(encoding="utf-8"):
        copy = free_name(path)
        shutil.copy2(path, copy)
        write_atomic(path, content)
        if len(kept) < len(found):
            words = "Resuming at step %d: removed %d later evaluations from the history, which is kept in full as %s"
            _log.info(words, start_step, len(found) - len(kept), copy)
    return kept


def _check_definition(path: Path, records: list[EvalRecord], definition: Mapping[str, str]) -> None:
    for field in DESCRIBED_FIELDS:
        for record in records:
            if field in definition and record[field] not in (None, definition[field]):
                raise HistoryError(
                    f"Cannot continue {path} with another {field}: it was {record[field]!r} at step {record.step} and "
                    f"is {definition[field]!r} now. Use the same probe (Probe.save, Probe.load), processor, prompt and "
                    "root, or move the file away to start a new history."
                )
