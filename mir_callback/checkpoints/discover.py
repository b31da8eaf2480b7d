# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints a folder stands for: their run, step and way of storage, and what the Trainer knew then."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mir_callback.best_model import NOTE_NAME
from mir_callback.checkpoints.results import RESULTS_NAME
from mir_callback.errors import ConfigError
from mir_callback.history import FILE_NAME
from mir_callback.probe.storage import RUN_PROBE
from mir_callback.record import EvalRecord, is_number

# Ways to store weights.
WHOLE, ADAPTER, PROJECTOR, SHARDS = "whole weights", "PEFT adapter", "projector only", "DeepSpeed ZeRO shards"

PROJECTOR_FILE = "mm_projector.bin"
ADAPTER_CONFIG = "adapter_config.json"
_TRAINER_STATE = "trainer_state.json"
_WHOLE_FILES = [
    f"{name}{index}" for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")
]
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]{0,14})")  # as a Trainer writes it: one name for each step
_SHARD_FOLDER = re.compile(r"global_step(0|[1-9][0-9]{0,14})")
_RUN_FILES = (FILE_NAME, RUN_PROBE, RESULTS_NAME)
_FILES_NAMED = 6


@dataclass(frozen=True)
class Checkpoint:
    """A folder with the weights of one step."""

    folder: Path  # with the weights and their configuration
    run: Path  # the output folder of the run they belong to; ``folder`` itself where there is none
    step: int  # the optimizer step they were saved after, 0 where nothing tells
    shards: str | None = None  # the folder of the ZeRO shards within ``folder``, if one was named
    step_known: bool = True

    @property
    def name(self) -> str:
        """The folder as seen from its run."""
        return self.folder.name if self.folder == self.run else self.folder.relative_to(self.run).as_posix()


@dataclass(frozen=True)
class Found:
    """What a folder stands for, and why weights in the run's own folder are not among it."""

    checkpoints: list[Checkpoint]  # at least one, in order of steps
    note: str | None = None  # where nothing is wrong with that
    error: ConfigError | None = None  # where something is


def find_checkpoints(folder: Path) -> Found:
    """The checkpoints that a folder stands for.

    A run stands for every `checkpoint-N` in it, and for the weights in the run's folder itself if something tells that
    they are of another step; any other folder stands for itself. ConfigError if the step of the only weights there are
    cannot be read.
    """
    folder = _locate(folder)
    numbered = [(path, _CHECKPOINT.fullmatch(path.name)) for path in folder.iterdir() if path.is_dir()]
    found = [Checkpoint(path, folder, int(match[1])) for path, match in numbered if match]
    if not found:
        return Found([_read_single(folder)])
    note, error = None, None
    if _recognize_storage(folder) is not None:
        try:
            step = _read_step(folder)
        except ConfigError as caught:
            error = caught
        else:
            if step is None:
                note = (
                    f"the weights in {folder} itself are left out: nothing there tells their step; to have them "
                    f"measured put {_TRAINER_STATE} beside them (trainer.save_state() writes it, "
                    '{"global_step": N} is enough), or move them into checkpoint-N'
                )
            elif step not in {checkpoint.step for checkpoint in found}:
                found.append(Checkpoint(folder, folder, step))
    return Found(sorted(found, key=lambda checkpoint: checkpoint.step), note, error)


def select_checkpoints(
    checkpoints: Sequence[Checkpoint], steps: Collection[int] | None, every: int | None
) -> list[Checkpoint]:
    """The checkpoints at these steps, at multiples of ``every``, or all; ConfigError if one or all are lacking."""
    run, known = checkpoints[0].run, [checkpoint.step for checkpoint in checkpoints]
    listed = ", ".join(map(str, known))
    lacking = sorted(set(steps or ()) - set(known))
    if lacking:
        raise ConfigError(f"--steps: {run} has no checkpoint of step {', '.join(map(str, lacking))}, only {listed}")
    kept = [
        checkpoint
        for checkpoint in checkpoints
        if (steps is None or checkpoint.step in steps) and (every is None or checkpoint.step % every == 0)
    ]
    if not kept:
        raise ConfigError(f"--every {every} leaves no checkpoint of {run}, whose steps are {listed}")
    return kept


def find_storage(checkpoint: Checkpoint) -> str:
    """How its weights are stored: WHOLE, ADAPTER, PROJECTOR or SHARDS; ConfigError if in no way known here."""
    folder = checkpoint.folder
    storage = SHARDS if checkpoint.shards else _recognize_storage(folder)
    if storage is not None:
        return storage
    names = sorted(path.name for path in folder.iterdir())
    listed = ", ".join(names[:_FILES_NAMED]) + (", ..." if len(names) > _FILES_NAMED else "") or "nothing"
    remedy = "name a folder written by save_pretrained, a Trainer, DeepSpeed, PEFT or LLaVA"
    if any(name.startswith("pytorch_model_fsdp") or name.endswith(".distcp") for name in names):
        remedy = f"make whole weights of FSDP's shards: accelerate merge-weights {folder}/pytorch_model_fsdp_0 OUT"
    raise ConfigError(f"{folder} holds no weights that can be opened, only {listed}; {remedy}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty if there is no such file; ConfigError if it is damaged, or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__} instead of an object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; save the checkpoint anew") from error
    return value


def read_trainer_state(checkpoint: Checkpoint) -> EvalRecord:
    """A record of what the Trainer knew when it saved, without a value yet; ConfigError if its file is damaged.

    The file may hold anything; what of it is no value of its field counts as not known.
    """
    state = read_json(checkpoint.folder / _TRAINER_STATE) or read_json(checkpoint.folder / NOTE_NAME)
    loss, loss_step = _find_newest_loss(state.get("log_history"), checkpoint.step)
    known = {"step": checkpoint.step, "mir": None, "epoch": state.get("epoch"), "loss": loss, "loss_step": loss_step}
    return EvalRecord.from_dict({**known, "tokens_seen": state.get("num_input_tokens_seen") or None}, [])


def compute_stamp(checkpoint: Checkpoint) -> str:
    """16 hexadecimal digits over names, sizes and times of a checkpoint's files; new when it is saved anew.

    Of a run's own folder only the files in it count, which change no more once training is over.
    """
    digest = hashlib.sha256()
    inner = checkpoint.folder.iterdir() if checkpoint.folder == checkpoint.run else checkpoint.folder.rglob("*")
    for path in sorted(path for path in inner if path.is_file() and not path.name.startswith("mir_")):
        known = path.stat()
        digest.update(f"{path.relative_to(checkpoint.folder)} {known.st_size} {known.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _locate(folder: Path) -> Path:
    """A folder's path, links followed; of a link that stands for a checkpoint in a run, its path in that run.

    Checkpoints are moved to other disks with a link left behind, and links are made as names of checkpoints: of the
    link's own folder and the one it leads to, the first that has something of a run's in it is the run.
    """
    if _SHARD_FOLDER.fullmatch(folder.name):
        return _locate(folder.parent) / folder.name
    real, named = folder.resolve(), folder.parent.resolve() / folder.name
    if folder.name in ("", "..") or not named.is_symlink():
        return real
    for path in (named, real):
        run = _find_run(path)
        if run != path and any((run / name).exists() for name in _RUN_FILES):
            return path
    return named if _CHECKPOINT.fullmatch(named.name) else real


def _read_single(folder: Path) -> Checkpoint:
    """A folder that is no run: a checkpoint of one, ZeRO shards in a checkpoint, or a model."""
    shards = _SHARD_FOLDER.fullmatch(folder.name)
    if shards and _is_sharded(folder):
        return Checkpoint(folder.parent, _find_run(folder.parent), int(shards[1]), shards=folder.name)
    step = _read_step(folder)
    return Checkpoint(folder, _find_run(folder), step or 0, step_known=step is not None)


def _find_run(folder: Path) -> Path:
    return folder.parent if _CHECKPOINT.fullmatch(folder.name) or (folder / NOTE_NAME).exists() else folder


def _read_step(folder: Path) -> int | None:
    """The step of the weights in a folder; None where nothing tells."""
    if numbered := _CHECKPOINT.fullmatch(folder.name):
        return int(numbered[1])
    for name, field in ((_TRAINER_STATE, "global_step"), (NOTE_NAME, "step")):
        step = read_json(folder / name).get(field)
        if type(step) is int and step >= 0:
            return step
    latest = folder / "latest"  # where DeepSpeed notes its newest shards
    try:
        shards = _SHARD_FOLDER.fullmatch(latest.read_text(encoding="utf-8").strip() if latest.is_file() else "")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{latest} cannot be read: {error}; name the shards: {folder / 'global_stepN'}") from error
    return int(shards[1]) if shards else None


def _recognize_storage(folder: Path) -> str | None:
    """Whole weights come first: in 16 bits they are what was trained with, unlike the shards' 32."""
    if (folder / ADAPTER_CONFIG).is_file():
        if any((folder / name).is_file() for name in _ADAPTER_FILES):
            return ADAPTER
    elif (folder / "config.json").is_file():
        if any((folder / name).is_file() for name in _WHOLE_FILES):
            return WHOLE
        if (folder / PROJECTOR_FILE).is_file():
            return PROJECTOR
    if (folder / "latest").is_file() or any(_is_sharded(path) for path in folder.glob("global_step*")):
        return SHARDS
    return None


def _is_sharded(folder: Path) -> bool:
    return any(folder.glob("*_model_states.pt"))


def _find_newest_loss(log: Any, upto: int) -> tuple[float | None, int | None]:
    """The last finite loss in a Trainer's log and its step; a log may hold anything."""
    for entry in reversed(log) if isinstance(log, list) else ():
        if not isinstance(entry, dict) or not is_number(entry.get("loss")):
            continue
        step = entry.get("step") if type(entry.get("step")) is int else None
        if step is None or step <= upto:
            return entry["loss"], step
    return None, None
