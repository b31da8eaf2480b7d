# SPDX-License-Identifier: Apache-2.0
"""The record of a run's evaluations: one JSON object a line, written as they happen, continued on resume."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mir_callback import distributed as collectives
from mir_callback.errors import HistoryError

FILE_NAME = "mir_history.jsonl"
# What makes values comparable; a history continues only if these are the same.
DEFINITION_FIELDS = ("probe_fingerprint", "tokens_fingerprint", "root")
# What may move values a little without making them another number: said when it changes, not refused.
CIRCUMSTANCES = {
    "dtype": "dtype of the hidden states",
    "world_size": "number of ranks",
    "pixels_fingerprint": "pixel inputs (settings of the image processor, or the version of an image library)",
}

STOPPING = "plateau"  # the verdict that ends a run, as records hold it

Record = dict[str, Any]


class History:
    """Records of one run, newest last; the same on every rank, written by rank 0.

    Attributes:
        records: the evaluations so far.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._path: Path | None = None
        self._size = 0  # bytes of whole lines written or continued
        self._torn = False
        self._unwritten = b""  # lines that could not be written yet

    def open(self, folder: str | Path, global_step: int, definition: Mapping[str, str]) -> None:
        """Start or continue the history of a run.

        At step 0 a new history starts; a file of an earlier run is moved aside, to `mir_history.<n>.jsonl`. Later
        the existing file is continued: records after ``global_step`` belong to a branch of the run that is not
        continued, and stay in a copy moved aside.

        Args:
            folder: the run's output folder; created if missing.
            global_step: where training starts now.
            definition: how values are made now, by DEFINITION_FIELDS.

        Raises:
            HistoryError: the existing history was made with another probe or definition, is damaged, or the folder
                cannot be written; on every rank.

        Ranks: collective.
        """
        path = Path(folder) / FILE_NAME
        records: list[Record] = []
        size = 0
        error: Exception | None = None
        if collectives.is_main():
            try:
                records = _continue(path, global_step, definition)
                size = path.stat().st_size
            except OSError as caught:
                error = HistoryError(
                    f"output_dir must be writable for {FILE_NAME}, got {path}: {caught}; choose another output_dir"
                )
            except Exception as caught:
                error = caught
        collectives.agree(error)
        self._path = path
        self._size, self._torn, self._unwritten = size, False, b""
        self.records = collectives.broadcast_object(records)

    def append(self, record: Record) -> None:
        """Add a record; rank 0 writes its line and flushes it to the disk before going on.

        Raises:
            OSError: the line could not be written (rank 0 only); the record is kept in memory and written with the
                next one.
            HistoryError: someone else writes the same file (rank 0 only).

        Ranks: all.
        """
        self.records.append(record)
        if collectives.is_main() and self._path is not None:
            self._unwritten += _line(record).encode()
            with self._path.open("r+b") as file:
                size = file.seek(0, os.SEEK_END)
                if size != self._size and not self._torn:
                    raise HistoryError(
                        f"{self._path} must be written by one MIRCallback only, got {size} bytes where this one has "
                        f"written {self._size}; keep one MIRCallback in a Trainer, and an output_dir for each run"
                    )
                self._torn = True  # until the line is whole, what lies behind the last whole one is debris
                file.truncate(self._size)
                file.seek(self._size)
                file.write(self._unwritten)
                file.flush()
                os.fsync(file.fileno())
                self._torn = False
                self._size += len(self._unwritten)
                self._unwritten = b""

    def has_step(self, step: int) -> bool:
        """Whether the newest record belongs to ``step``."""
        return bool(self.records) and self.records[-1]["step"] == step


def run_folder(trainer: Any, args: Any) -> str:
    """Where the run that begins now keeps what it writes: its `output_dir`, or in a hyperparameter search the trial's.

    Args:
        trainer: its Trainer, or None where that is not known.
        args: its TrainingArguments.

    Ranks: all, once training is prepared.
    """
    trial = getattr(trainer, "_trial", None)
    return str((args.output_dir if trial is None else trainer._get_output_dir(trial)) or ".")


def is_candidate(record: Mapping[str, Any]) -> bool:
    """Whether a record's weights may be the best ones: trained, and measured. Ranks: pure."""
    return record["step"] > 0 and record["mir"] is not None and math.isfinite(record["mir"])


def lowest_record(records: Sequence[Record]) -> Record | None:
    """The candidate with the lowest MIR, the earliest of equal ones. Ranks: pure."""
    return min(filter(is_candidate, records), key=lambda record: float(record["mir"]), default=None)


def stopped(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the run ended on its stop rule at its newest record. Ranks: pure."""
    return bool(records) and records[-1].get("verdict") == STOPPING


def since_last_stop(records: Sequence[Record]) -> Sequence[Record]:
    """The records a rule judges: those after the last stop, which a run that has more of them was told to go past.

    Ranks: pure.
    """
    starts = [number for number, record in enumerate(records, start=1) if record.get("verdict") == STOPPING]
    return records[starts[-1] :] if starts else records


def changed_circumstances(earlier: Sequence[Mapping[str, Any]], record: Mapping[str, Any]) -> str | None:
    """What differs between a record and the values before it, as a sentence; None if nothing does.

    Fields that an earlier record lacks, as a failed evaluation's does, are looked for further back.

    Ranks: pure.
    """
    told = []
    for field, meaning in CIRCUMSTANCES.items():
        known = [past for past in earlier if past.get(field) is not None]
        if known and record.get(field) is not None and known[-1][field] != record[field]:
            told.append(f"{meaning}: {known[-1][field]} up to step {known[-1]['step']}, now {record[field]}")
    if not told:
        return None
    return (
        f"step {record['step']}: MIR is measured under other circumstances than before, and a step in its curve here "
        f"may come from them: {'; '.join(told)}"
    )


def read_history(path: str | Path) -> list[Record]:
    """Read a history file.

    Blank lines are passed over. A last line that is not whole, as a killed process leaves it, is dropped.

    Args:
        path: the `.jsonl` file.

    Returns:
        The records, oldest first.

    Raises:
        HistoryError: not a text file, or a line is no JSON object with a whole `step` and a `mir` that is a number or
            null; the message names the line.

    Ranks: any.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise HistoryError(f"{path} must be UTF-8 text, got {error}; move the file away to start a new one") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(parse_record(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise HistoryError(
                f"{path}, line {number} must be a JSON object with step and mir, got {line!r:.80}: {error}; "
                "repair or remove that line"
            ) from error
    return records


def parse_record(line: str) -> Record:
    """One line's record; ValueError if it is none. Ranks: pure."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    record = json.loads(line, parse_constant=refuse)
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        raise ValueError("not an object with a whole step")
    if "mir" not in record or not (record["mir"] is None or type(record["mir"]) in (int, float)):
        raise ValueError("its mir is neither a number nor null")
    return record


def _continue(path: Path, global_step: int, definition: Mapping[str, str]) -> list[Record]:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.touch()
        return []
    if global_step == 0:
        if path.stat().st_size > 0:
            os.replace(path, _free_name(path))
        path.touch()
        return []
    found = read_history(path)
    _check_definition(path, found, definition)
    kept = [record for record in found if record["step"] <= global_step]
    content = "".join(_line(record) for record in kept)
    if content != path.read_text(encoding="utf-8"):
        # Written beside and renamed: at no moment is there neither the old file nor the new one.
        beside = path.with_suffix(".new")
        beside.write_text(content, encoding="utf-8")
        shutil.copy2(path, _free_name(path))
        os.replace(beside, path)
    return kept


def _check_definition(path: Path, records: list[Record], definition: Mapping[str, str]) -> None:
    for record in records:
        for field in DEFINITION_FIELDS:
            if field in record and record[field] != definition[field]:
                raise HistoryError(
                    f"{field} must be that of the history being continued, got {definition[field]} but {path} has "
                    f"{record[field]} at step {record['step']}; use the same probe, processor and root "
                    "(Probe.save and Probe.load), or move the history file away to start a new one"
                )


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    return candidate


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"
