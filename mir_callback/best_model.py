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

from torch import nn

from mir_callback import distributed
from mir_callback.errors import ConfigError, HistoryError
from mir_callback.fs import free_name, fsync, write_atomic, write_new
from mir_callback.model.parallelism import find_groups
from mir_callback.model.sharding import fsdp_states, is_sharded
from mir_callback.record import (
    CIRCUMSTANCES,
    DEFINITION_FIELDS,
    EvalRecord,
    is_count,
    is_number,
    lowest_record,
    read_definition,
)

# Not `checkpoint-*`, so that the Trainer neither rotates it away nor resumes from it.
FOLDER_NAME = "mir_best"
NOTE_NAME = "mir_best.json"
_MARK = "mir_callback.txt"
_MARKED = "Made by mir-callback while it replaces mir_best; the next start of the run removes this folder.\n"
_DISCARDED = "discarded"  # of a note: the step that training was resumed at, before these weights
_NOTED = ("step", "epoch", "mir", *DEFINITION_FIELDS, *CIRCUMSTANCES, "time")
_COMPILED = "_orig_mod."
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".distcp")

log = logging.getLogger(__name__)

# Writes the weights of the model in training into a folder that exists and is empty; called on every rank.
WeightSaver = Callable[[Path], None]


class BestModel:
    """The best model of one run in `<output_dir>/mir_best/`.

    New weights are written to `.mir_best.new/new`, the folder is renamed to `.mir_best.new/old`, the new one to
    `mir_best`, and `.mir_best.new` removed. If the process is killed at any point, one of these folders is complete,
    which the note in it (`mir_best.json`, written last) shows, and the next start restores it. A mark in the folder
    `.mir_best.new` says that it may be removed; without it another name is used.

    What counts is the history that this run continues. Weights of a branch that it has left, by resuming before them,
    stay until better ones replace them, and their note says so (`discarded`). A folder of another run (``records`` is
    empty, its note has another definition or is damaged) is moved aside, to `mir_best.<n>`, when this run first writes
    its own.

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
                    exists, note = os.path.lexists(self._path), _read_note(self._path)
                    if note is not None and _is_left(note, records, definition):
                        _discard(self._path, note, records[-1].step)
                except OSError as error:
                    raise HistoryError(
                        f"keep_best could not read or write {self._path}: {error}. Choose another output_dir."
                    ) from error
                if exists and note is None:
                    log.warning("%s has no valid %s: it will be moved aside by the next best", self._path, NOTE_NAME)
        exists, note = distributed.broadcast_object((exists, note))
        is_held = note is not None and _is_of(note, records, definition)
        self._foreign = exists and not is_held and not (note is not None and _is_left(note, records, definition))
        earlier = lowest_record(records)
        self.lowest: float | None = None
        if is_held and note is not None:
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
                with contextlib.suppress(OSError):
                    _undo(self._path)
                log.warning("step %d: could not save the best weights, %s: %s", record.step, kept, error)
            return
        self.lowest, self._foreign = record.mir, False
        log.info("step %d: lowest MIR so far, saved the weights to %s", record.step, FOLDER_NAME)

    def _replace(self, record: EvalRecord) -> None:
        staging = self._path
        with distributed.fail_together():
            if distributed.is_main():
                staging = _stage(self._path)
        staging = distributed.broadcast_object(staging)
        with distributed.fail_together():
            self._save(staging / "new")
        with distributed.fail_together():
            if distributed.is_main():
                _complete(staging / "new", {name: record[name] for name in _NOTED if record[name] is not None})
                _publish(staging, self._path, aside=self._foreign)


def without_compilers(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights by their names without `torch.compile`, if parts of the model were replaced by compiled ones; else empty.

    Saved under the others, they would not be found when the model is loaded.
    """
    is_compiled = any(_COMPILED in name for name in weights)
    return {name.replace(_COMPILED, ""): each for name, each in weights.items()} if is_compiled else {}


def default_saver(model: nn.Module, processor: Any = None) -> WeightSaver:
    """`save_pretrained`, if every rank holds the whole model or FSDP2 can gather it; of a processor too if given."""
    top: Any = model
    while isinstance(getattr(top, "module", None), nn.Module):
        top = top.module
    with_fsdp2 = bool(fsdp_states(model))
    is_spread = bool(find_groups(model).model) or (is_sharded(model) and not with_fsdp2)
    if is_spread or not hasattr(top, "save_pretrained"):
        why = "its weights are sharded" if is_spread else f"{type(top).__name__} has no save_pretrained"
        raise ConfigError(
            f"keep_best can't save this model: {why}; pass save_weights, a function that writes the weights into a "
            "folder and is called on every rank, or attach to a Trainer"
        )

    def save(folder: Path) -> None:
        weights = distributed.gather_weights(model) if with_fsdp2 else {}
        if distributed.is_main():
            weights = weights or without_compilers(top.state_dict())
            top.save_pretrained(str(folder), **({"state_dict": weights} if weights else {}))
            if hasattr(processor, "save_pretrained"):
                processor.save_pretrained(str(folder))  # `mir eval` needs it

    return save


def _is_made_alike(note: Mapping[str, Any], definition: Mapping[str, Any]) -> bool:
    return all(read_definition(note, field) == read_definition(definition, field) for field in DEFINITION_FIELDS)


def _is_of(note: Mapping[str, Any], records: Sequence[EvalRecord], definition: Mapping[str, str]) -> bool:
    """Whether these are the weights of one of the records."""
    is_known = any((record.step, record.mir) == (note["step"], note["mir"]) for record in records)
    return is_known and _is_made_alike(note, definition) and _DISCARDED not in note


def _is_left(note: Mapping[str, Any], records: Sequence[EvalRecord], definition: Mapping[str, str]) -> bool:
    """Whether these weights are of a branch that the run has left: later than all that it continues."""
    is_later = bool(records) and note["step"] > records[-1].step
    return (is_later or _DISCARDED in note) and bool(records) and _is_made_alike(note, definition)


def _discard(folder: Path, note: dict[str, Any], step: int) -> None:
    if _DISCARDED in note:
        return
    words = "%s holds the weights of step %d, of a branch that this run leaves; they stay until its next best"
    log.info(words, folder, note["step"])
    write_atomic(folder / NOTE_NAME, json.dumps({**note, _DISCARDED: step}, allow_nan=False) + "\n")


def _read_note(folder: Path) -> dict[str, Any] | None:
    """The note of a complete folder; None if there is no valid one."""
    if not (folder / NOTE_NAME).is_file():
        return None
    try:
        note = json.loads((folder / NOTE_NAME).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return note if isinstance(note, dict) and is_count(note.get("step")) and is_number(note.get("mir")) else None


def _complete(folder: Path, note: Mapping[str, Any]) -> None:
    """Flush everything in ``folder`` to disk, then write the note that marks it as complete."""
    files = sorted(found for found in folder.rglob("*") if found.is_file())
    if not any(file.suffix in _WEIGHTS and file.name != "training_args.bin" for file in files):
        raise OSError(f"no weights were saved to {folder}, only {', '.join(f.name for f in files) or 'nothing'}")
    for file in files:
        fsync(file)
    write_new(folder / NOTE_NAME, json.dumps(note, allow_nan=False) + "\n")


def _stage(path: Path) -> Path:
    """A folder of ours beside ``path``, with an empty folder `new` in it."""
    staging = path.with_name(f".{path.name}.new")
    if _is_ours(staging):
        _remove(staging)
    if os.path.lexists(staging):
        staging = free_name(staging)
    staging.mkdir(parents=True)
    write_new(staging / _MARK, _MARKED)
    (staging / "new").mkdir()
    return staging


def _is_ours(staging: Path) -> bool:
    if staging.is_symlink() or not staging.is_dir():
        return False
    mark = staging / _MARK
    return mark.read_bytes() == _MARKED.encode() if mark.is_file() else not any(staging.iterdir())


def _publish(staging: Path, path: Path, *, aside: bool) -> None:
    """Rename the new folder to ``path``, and the one there before to the next free name, or remove it."""
    old = free_name(path) if aside else staging / "old"
    existed = os.path.lexists(path)
    if existed:
        os.replace(path, old)
    try:
        os.replace(staging / "new", path)
    except OSError:
        if existed:
            os.replace(old, path)
        raise
    # The new folder is in place; whatever fails from here on, the next save or start cleans up.
    with contextlib.suppress(OSError):
        fsync(path.parent)
        _remove(staging)


def _left_over(path: Path) -> list[Path]:
    return [staging for staging in sorted(path.parent.glob(f".{path.name}*.new")) if _is_ours(staging)]


def _undo(path: Path) -> None:
    """Take back a save that has failed."""
    for staging in _left_over(path):
        (staging / "new" / NOTE_NAME).unlink(missing_ok=True)
    _repair(path)


def _repair(path: Path) -> None:
    """Complete or undo what a killed process has left half done."""
    for staging in _left_over(path):
        note, old = _read_note(staging / "new"), staging / "old"
        if note is not None:  # killed between the note and the last rename
            before = _read_note(path)
            _publish(staging, path, aside=before is None or not _is_made_alike(before, note))
        elif _read_note(old) is not None and not os.path.lexists(path):
            os.replace(old, path)
        if staging.exists():
            _remove(staging)


def _remove(staging: Path) -> None:
    """Delete it: the notes first, so that no half-deleted folder counts as complete; its mark last."""
    for part in (staging / "new", staging / "old"):
        if part.is_symlink():
            part.unlink()
        elif part.is_dir():
            (part / NOTE_NAME).unlink(missing_ok=True)
            shutil.rmtree(part)
    (staging / _MARK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody has put something there
        staging.rmdir()
