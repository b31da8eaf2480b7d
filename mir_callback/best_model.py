# SPDX-License-Identifier: Apache-2.0
"""Keeping the best model: the weights with the lowest MIR, in a folder of their own that is whole at every moment."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transformers import TrainingArguments

from mir_callback import distributed as collectives
from mir_callback.errors import ConfigError, HistoryError
from mir_callback.history import CIRCUMSTANCES, DEFINITION_FIELDS, Record, is_candidate, lowest_record

# Not `checkpoint-*`: neither a Trainer's rotation nor the search for a checkpoint to resume from may find it.
FOLDER_NAME = "mir_best"
NOTE_NAME = "mir_best.json"
# The name of MIR among the metrics of a Trainer's own evaluation.
EVAL_METRIC = "eval_mir"
_NOTED = ("step", "epoch", "mir", *DEFINITION_FIELDS, *CIRCUMSTANCES, "time")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".distcp")


class WeightSaver(Protocol):
    """Writes the weights of the model in training."""

    def __call__(self, folder: Path) -> None:
        """Write them into ``folder``, which exists and is empty. Ranks: collective."""
        ...

    def notice(self) -> str | None:
        """What a user should know before training, or None. Ranks: all, once training is prepared."""
        ...


@runtime_checkable
class OffersSaver(Protocol):
    """An adapter whose family of models does not save everything that `Trainer.save_model` does, or not like it."""

    def weight_saver(self, trainer: Any) -> WeightSaver | None:
        """The saver for this Trainer, or None if the Trainer's own is right."""
        ...


def saver_for(trainer: Any, adapter: Any) -> WeightSaver:
    """The adapter's own saver for this Trainer if it has one, else the Trainer's. Ranks: all."""
    offered = adapter.weight_saver(trainer) if isinstance(adapter, OffersSaver) else None
    return offered or TrainerSaver(trainer)


class TrainerSaver:
    """What `Trainer.save_model` writes: whole weights, or DeepSpeed's shards where it may not consolidate them."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def __call__(self, folder: Path) -> None:
        """See :class:`WeightSaver`."""
        self._trainer.save_model(str(folder), _internal_call=True)  # internal: nothing is pushed to a hub

    def notice(self) -> str | None:
        """See :class:`WeightSaver`."""
        engine = getattr(self._trainer, "deepspeed", None)
        if engine is None or engine.zero_optimization_stage() != 3 or engine.zero_gather_16bit_weights_on_model_save():
            return None
        return (
            f"{FOLDER_NAME} will hold DeepSpeed's shards with the optimizer's state, as the Trainer's own checkpoints "
            "do; zero_to_fp32.py in it makes weights of them. For whole weights set "
            "stage3_gather_16bit_weights_on_model_save to true in the DeepSpeed configuration"
        )


class BestModel:
    """The best model of one run in `<output_dir>/mir_best/`.

    A new best is written to `mir_best.new` and then takes the old one's place, which is `mir_best.old` for that moment;
    a process killed at any time leaves a whole one under one of these names, and the next start puts it right. The
    note in it, written last, says that a folder is whole.

    Args:
        saver: writes the weights.

    Attributes:
        lowest: MIR that a new best must be below, None if any will do.
    """

    def __init__(self, saver: WeightSaver) -> None:
        self._saver = saver
        self._path: Path | None = None
        self._foreign = False
        self.lowest: float | None = None

    def open(self, output_dir: str | Path, records: Sequence[Record], definition: Mapping[str, str]) -> list[str]:
        """Find out what is kept already; to be called once the history is open.

        A folder that another run has left (``records`` is empty, or its note names another probe or definition) is
        moved aside, to `mir_best.<n>`, when this run has something to put in its place.

        Args:
            output_dir: the run's output folder.
            records: of the run so far.
            definition: how values are made now.

        Returns:
            What to say about it, in lines.

        Raises:
            HistoryError: the folder cannot be read or repaired; on every rank.

        Ranks: collective.
        """
        path = Path(output_dir) / FOLDER_NAME
        note: Record | None = None
        exists = False
        with collectives.all_or_none():
            if collectives.is_main():
                try:
                    _repair(path)
                    exists, note = path.exists(), _read_note(path)
                except OSError as error:
                    raise HistoryError(
                        f"keep_best needs {path} readable and writable, got {error}; choose another output_dir"
                    ) from error
        exists, note = collectives.broadcast_object((exists, note))
        ours = bool(records) and note is not None and all(note.get(f) == definition[f] for f in DEFINITION_FIELDS)
        self._path, self._foreign = path, exists and not ours
        best = note if ours else lowest_record(records)
        self.lowest = None if best is None else float(best["mir"])
        notice = self._saver.notice()
        lines = [] if notice is None else [notice]
        if best is not None:
            held = f"the weights of step {best['step']}" if ours else "nothing of this run, whose best was not kept"
            lines.append(f"{FOLDER_NAME} holds {held}; lower than MIR {best['mir']:.4f} will take its place")
        return lines

    def offer(self, record: Record) -> str | None:
        """Keep the weights as they are now if this record, made with them, is the best so far.

        Weights before the first step are no candidates: they are where the run began, and fresh projectors start low.
        A save that fails on any rank warns on all, and what was kept before stays.

        Returns:
            What to say about it, or None if the record is no new best.

        Ranks: collective.
        """
        if self._path is None or not is_candidate(record):
            return None
        if self.lowest is not None and record["mir"] >= self.lowest:
            return None
        try:
            self._replace(self._path, record)
        except Exception as error:
            if not collectives.is_shared(error):
                raise
            if collectives.is_main():
                shutil.rmtree(_beside(self._path, "new"), ignore_errors=True)
            kept = "what was kept before stays" if self.lowest is not None else "nothing is kept yet"
            warnings.warn(
                f"step {record['step']}: the best model could not be saved, training goes on and {kept}: {error}",
                stacklevel=2,
            )
            return None
        self.lowest, self._foreign = record["mir"], False
        return f"step {record['step']}: lowest MIR so far, weights kept in {FOLDER_NAME}"

    def _replace(self, path: Path, record: Record) -> None:
        new = _beside(path, "new")
        with collectives.all_or_none():
            if collectives.is_main():
                if new.exists():
                    shutil.rmtree(new)
                new.mkdir(parents=True)
        with collectives.all_or_none():
            self._saver(new)
        with collectives.all_or_none():
            if collectives.is_main():
                _complete(new, {name: record[name] for name in _NOTED if name in record})
                _publish(new, path, _free_name(path) if self._foreign else _beside(path, "old"))


def chooses_by_mir(args: TrainingArguments) -> bool:
    """Whether the Trainer is to choose its best checkpoint by MIR. Ranks: pure."""
    return getattr(args, "metric_for_best_model", None) in (EVAL_METRIC, EVAL_METRIC.removeprefix("eval_"))


def check_best_metric(args: TrainingArguments) -> None:
    """Refuse a Trainer that would keep the checkpoint with the highest MIR. Ranks: pure."""
    if chooses_by_mir(args) and args.greater_is_better is not False:
        raise ConfigError(
            f"greater_is_better must be False with metric_for_best_model={args.metric_for_best_model!r}, got "
            f"{args.greater_is_better}, which transformers sets by itself; lower MIR is better: "
            "pass greater_is_better=False to TrainingArguments"
        )


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name}.{kind}")


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := _beside(path, str(number))).exists():
        number += 1
    return candidate


def _read_note(folder: Path) -> Record | None:
    """The note of a whole folder; None where there is none."""
    try:
        note = json.loads((folder / NOTE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    fits = isinstance(note, dict) and type(note.get("step")) is int and type(note.get("mir")) in (int, float)
    return note if fits else None


def _complete(folder: Path, note: Record) -> None:
    """Have everything in ``folder`` on the disk, then say in it that it is whole."""
    files = sorted(found for found in folder.rglob("*") if found.is_file())
    if not any(file.suffix in _WEIGHTS and file.name != "training_args.bin" for file in files):
        raise OSError(
            f"the Trainer wrote no weights into {folder} ({', '.join(file.name for file in files) or 'nothing at all'})"
        )
    for file in files:
        _flush(file)
    told = folder / NOTE_NAME
    told.write_text(json.dumps(note, allow_nan=False) + "\n", encoding="utf-8")
    _flush(told)


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
        _flush(path.parent)
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
        _publish(new, path, old if same else _free_name(path))
    for leftover in (new, old):
        _remove(leftover)


def _remove(folder: Path) -> None:
    """Delete a folder, its note first, so that half of it is never taken for a whole one."""
    (folder / NOTE_NAME).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
