# SPDX-License-Identifier: Apache-2.0
"""Keeping the best model: the weights with the lowest MIR, in a folder of their own that is whole at every moment."""

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
from mir_callback.record import CIRCUMSTANCES, DEFINITION_FIELDS, EvalRecord, lowest_record

# Not `checkpoint-*`: neither a Trainer's rotation nor the search for a checkpoint to resume from may find it.
FOLDER_NAME = "mir_best"
NOTE_NAME = "mir_best.json"
_NOTED = ("step", "epoch", "mir", *DEFINITION_FIELDS, *CIRCUMSTANCES, "time")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".distcp")

log = logging.getLogger(__name__)


# Writes the weights of the model in training into a folder that exists and is empty; called on every rank.
WeightSaver = Callable[[Path], None]


class BestModel:
    """The best model of one run in `<output_dir>/mir_best/`.

    A new best is written to `mir_best.new` and then takes the old one's place, which is `mir_best.old` for that moment;
    a process killed at any time leaves a whole one under one of these names, and the next start puts it right. The
    note in it, written last, says that a folder is whole.

    A folder that another run has left (``records`` is empty, or its note names another probe or definition) is moved
    aside, to `mir_best.<n>`, when this run has something to put in its place.

    Attributes:
        lowest: MIR that a new best must be below, None if any will do.

    Raises:
        HistoryError: the folder cannot be read or repaired; on every rank.

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
                        f"keep_best cannot read or write {self._path}: {error}; choose another output_dir"
                    ) from error
        exists, note = distributed.broadcast_object((exists, note))
        ours = bool(records) and note is not None and all(note.get(f) == definition[f] for f in DEFINITION_FIELDS)
        self._foreign = exists and not ours
        earlier = lowest_record(records)
        self.lowest: float | None = None
        if ours and note is not None:
            self.lowest, kept = float(note["mir"]), f"the weights of step {note['step']}"
        elif earlier is not None:
            self.lowest, kept = earlier.mir, f"nothing of this run, whose best (step {earlier.step}) was not kept"
        if self.lowest is not None:
            log.info("%s holds %s; lower than MIR %.4f will take its place", FOLDER_NAME, kept, self.lowest)

    def offer(self, record: EvalRecord) -> None:
        """Keep the weights as they are now if this record, made with them, is the best so far.

        Weights before the first step are no candidates: they are where the run began, and fresh projectors start low.
        A save that fails on any rank warns, and what was kept before stays. Ranks: collective.
        """
        if not record.is_trained or record.mir is None or (self.lowest is not None and record.mir >= self.lowest):
            return
        try:
            self._replace(record)
        except Exception as error:
            if not distributed.is_shared(error):
                raise
            kept = "what was kept before stays" if self.lowest is not None else "nothing is kept yet"
            if distributed.is_main():
                shutil.rmtree(_beside(self._path, "new"), ignore_errors=True)
                log.warning("step %d: the best model could not be saved, %s: %s", record.step, kept, error)
            return
        self.lowest, self._foreign = record.mir, False
        log.info("step %d: lowest MIR so far, weights kept in %s", record.step, FOLDER_NAME)

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
    """The note of a whole folder; None where there is none."""
    try:
        note = json.loads((folder / NOTE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    fits = isinstance(note, dict) and type(note.get("step")) is int and type(note.get("mir")) in (int, float)
    return note if fits else None


def _complete(folder: Path, note: Mapping[str, Any]) -> None:
    """Have everything in ``folder`` on the disk, then say in it that it is whole."""
    files = sorted(found for found in folder.rglob("*") if found.is_file())
    if not any(file.suffix in _WEIGHTS and file.name != "training_args.bin" for file in files):
        raise OSError(f"no weights were written into {folder}, only {', '.join(f.name for f in files) or 'nothing'}")
    for file in files:
        fsync(file)
    written = folder / NOTE_NAME
    written.write_text(json.dumps(note, allow_nan=False) + "\n", encoding="utf-8")
    fsync(written)


def _publish(new: Path, path: Path, aside: Path) -> None:
    """Put ``new`` where ``path`` is, and what is there ``aside``; gone at once if that is its own old place."""
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
    # The new one is in its place: what fails from here on is tidied up by the next save or start.
    with contextlib.suppress(OSError):
        fsync(path.parent)
        _remove(old)


def _repair(path: Path) -> None:
    """Put right what a process that was killed has left."""
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
    """Delete a folder, its note first, so that half of it is never taken for a whole one."""
    (folder / NOTE_NAME).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
