# SPDX-License-Identifier: Apache-2.0
"""keep_best: the weights with the lowest MIR, in a folder that is complete at any moment."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mir_callback import distributed
from mir_callback.errors import HistoryError
from mir_callback.fs import free_name, fsync
from mir_callback.record import CIRCUMSTANCES, DEFINITION_FIELDS, EvalRecord, is_count, is_number, lowest_record

# Not `checkpoint-*`, so that the Trainer neither rotates it away nor resumes from it.
FOLDER_NAME = "mir_best"
NOTE_NAME = "mir_best.json"
_NOTED = ("step", "epoch", "mir", *DEFINITION_FIELDS, *CIRCUMSTANCES, "time")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".distcp")

log = logging.getLogger(__name__)

# Writes the weights of the model in training into a folder that exists and is empty; called on every rank.
WeightSaver = Callable[[Path], None]


class BestModel:
    """The best model of one run in `<output_dir>/mir_best/`.

    New weights are written to `mir_best.new`, the folder is renamed to `mir_best.old`, the new one to `mir_best`, and
    the old one removed. If the process is killed at any point, one of these folders is complete, which the note in it
    (`mir_best.json`, written last) shows, and the next start restores it.

    A folder of another run (``records`` is empty, or its note has another definition) is moved aside, to
    `mir_best.<n>`, when this run first writes its own.

    Attributes:
        lowest: the MIR to beat; None before there is one.

    Raises:
        HistoryError: the folder cannot be read or restored; on every rank.

    Ranks: collective.
    """

    def __init__(
        self, save: WeightSaver, output_dir: str | Path, records: Sequence[EvalRecord], definition: Mapping[str, str]
    ) -> None:
        self._save = save
        self._path = Path(output_dir) / FOLDER_NAME
        note: dict[str, Any] | None = None
        exists = False
        with distributed.fail_together():
            if distributed.is_main():
                try:
                    _repair(self._path)
                    exists, note = self._path.exists(), _read_note(self._path)
                except OSError as error:
                    raise HistoryError(
                        f"keep_best could not read or write {self._path}: {error}. Choose another output_dir."
                    ) from error
        exists, note = distributed.broadcast_object((exists, note))
        ours = bool(records) and note is not None and all(note.get(f) == definition[f] for f in DEFINITION_FIELDS)
        self._foreign = exists and not ours
        earlier = lowest_record(records)
        self.lowest: float | None = None
        if ours and note is not None:
            self.lowest, kept = float(note["mir"]), f"holds the weights of step {note['step']}"
        elif earlier is not None:
            self.lowest, kept = earlier.mir, f"does not hold this run's best weights so far (step {earlier.step})"
        if self.lowest is not None:
            log.info("%s %s; it will be replaced by the first with a MIR below %.4f", FOLDER_NAME, kept, self.lowest)

    def offer(self, record: EvalRecord) -> None:
        """Save the model's weights if this record of them has the lowest MIR so far.

        Step 0 does not count: a freshly initialized projector starts with a low MIR. If saving fails on any rank, a
        warning is logged and the weights saved before stay. Ranks: collective.
        """
        if not record.is_after_start or record.mir is None or (self.lowest is not None and record.mir >= self.lowest):
            return
        try:
            self._replace(record)
        except Exception as error:
            if not distributed.is_shared(error):
                raise
            kept = "keeping the earlier ones" if self.lowest is not None else "none are saved yet"
            if distributed.is_main():
                shutil.rmtree(_beside(self._path, "new"), ignore_errors=True)
                log.warning("step %d: could not save the best weights, %s: %s", record.step, kept, error)
            return
        self.lowest, self._foreign = record.mir, False
        log.info("step %d: lowest MIR so far, saved the weights to %s", record.step, FOLDER_NAME)

    def _replace(self, record: EvalRecord) -> None:
        new = _beside(self._path, "new")
        with distributed.fail_together():
            if distributed.is_main():
                if new.exists():
                    shutil.rmtree(new)
                new.mkdir(parents=True)
        with distributed.fail_together():
            self._save(new)
        with distributed.fail_together():
            if distributed.is_main():
                _complete(new, {name: record[name] for name in _NOTED if record[name] is not None})
                _publish(new, self._path, free_name(self._path) if self._foreign else _beside(self._path, "old"))


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name}.{kind}")


def _read_note(folder: Path) -> dict[str, Any] | None:
    """The note of a complete folder; None if there is no valid one."""
    try:
        note = json.loads((folder / NOTE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return note if isinstance(note, dict) and is_count(note.get("step")) and is_number(note.get("mir")) else None


def _complete(folder: Path, note: Mapping[str, Any]) -> None:
    """Flush everything in ``folder`` to disk, then write the note that marks it as complete."""
    files = sorted(found for found in folder.rglob("*") if found.is_file())
    if not any(file.suffix in _WEIGHTS and file.name != "training_args.bin" for file in files):
        raise OSError(f"no weights were saved to {folder}, only {', '.join(f.name for f in files) or 'nothing'}")
    for file in files:
        fsync(file)
    written = folder / NOTE_NAME
    written.write_text(json.dumps(note, allow_nan=False) + "\n", encoding="utf-8")
    fsync(written)


def _publish(new: Path, path: Path, aside: Path) -> None:
    """Rename ``path`` to ``aside`` and ``new`` to ``path``; remove `mir_best.old`."""
    old = _beside(path, "old")
    _remove(old)
    existed = path.exists()
    if existed:
        os.replace(path, aside)
    try:
        os.replace(new, path)
    except OSError:
        if existed:
            os.replace(aside, path)
        raise
    # The new folder is in place; whatever fails from here on, the next save or start cleans up.
    with contextlib.suppress(OSError):
        fsync(path.parent)
        _remove(old)


def _repair(path: Path) -> None:
    """Complete or undo what a killed process has left half done."""
    new, old = _beside(path, "new"), _beside(path, "old")
    note = _read_note(new)
    if note is None and not path.exists() and _read_note(old) is not None:
        os.replace(old, path)
    if note is not None:  # killed between the note and the last rename
        before = _read_note(path) or {}
        same = all(before.get(field) == note.get(field) for field in DEFINITION_FIELDS)
        _publish(new, path, old if same else free_name(path))
    for leftover in (new, old):
        _remove(leftover)


def _remove(folder: Path) -> None:
    """Delete a folder, its note first, so that a half-deleted one never counts as complete."""
    (folder / NOTE_NAME).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
