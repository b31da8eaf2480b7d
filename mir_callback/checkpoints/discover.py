# SPDX-License-Identifier: Apache-2.0
"""Find the checkpoints of a folder: their run, step and storage format, and the Trainer's state."""

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
from mir_callback.fs import require_file
from mir_callback.history import FILE_NAME
from mir_callback.probe.storage import RUN_PROBE
from mir_callback.record import EvalRecord, is_count, is_number

# Storage formats.
WHOLE, ADAPTER, PROJECTOR, SHARDS = "whole weights", "PEFT adapter", "projector only", "DeepSpeed ZeRO shards"
DCP = "FSDP shards"  # of torch.distributed.checkpoint

PROJECTOR_FILE = "mm_projector.bin"
ADAPTER_CONFIG = "adapter_config.json"
_TRAINER_STATE = "trainer_state.json"
_WHOLE_FILES = [
    f"{name}{index}" for name in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")
]
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]{0,14})")  # as the Trainer names them
# As Lightning names them; folders where its strategy saves shards.
_LIGHTNING = re.compile(r".*step=(0|[1-9][0-9]{0,14})\.ckpt")
_LIGHTNING_LEVELS = 4  # run/lightning_logs/version_0/checkpoints/X.ckpt
_DCP_FOLDER = "pytorch_model_fsdp_0"  # in a checkpoint of Accelerate or the Trainer
_SHARD_FOLDER = re.compile(r"global_step(0|[1-9][0-9]{0,14})")
_RUN_FILES = (FILE_NAME, RUN_PROBE, RESULTS_NAME)
_FILES_NAMED = 6


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one step."""

    folder: Path  # with the weights and their configuration
    run: Path  # output folder of their run; ``folder`` itself if there is none
    step: int  # optimizer steps before they were saved; 0 if unknown
    shards: str | None = None  # folder of the ZeRO shards in ``folder``, if the user named one
    step_known: bool = True

    @property
    def name(self) -> str:
        """The folder, relative to its run."""
        return self.folder.name if self.folder == self.run else self.folder.relative_to(self.run).as_posix()


@dataclass(frozen=True)
class Found:
    """The checkpoints of a folder, and why weights in the run's own folder are not among them."""

    checkpoints: list[Checkpoint]  # at least one, sorted by step
    note: str | None = None  # a reason that is no error
    error: ConfigError | None = None


def find_checkpoints(folder: Path) -> Found:
    """Find the checkpoints of a folder.

    For a run these are every `checkpoint-N` in it, Lightning's in it or in its `checkpoints`, and the weights in its
    own folder if they are known to be of another step; any other folder is a checkpoint itself. ConfigError if the
    step of the only weights cannot be read.
    """
    folder = _locate(folder)
    numbered = [(path, _CHECKPOINT.fullmatch(path.name)) for path in folder.iterdir() if path.is_dir()]
    found = [Checkpoint(path, folder, int(match[1])) for path, match in numbered if match]
    inner = [path for place in (folder, folder / "checkpoints") for path in place.glob("*.ckpt") if find_dcp(path)]
    named = [(path, _LIGHTNING.fullmatch(path.name)) for path in inner]
    found += [Checkpoint(path, _find_run(path, folder), int(match[1])) for path, match in named if match]
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
                    f"skipped the weights in {folder} itself, as their step is unknown. To measure them, write "
                    f"{_TRAINER_STATE} beside them (trainer.save_state(); "
                    '{"global_step": N} is enough), or move them to checkpoint-N'
                )
            elif step not in {checkpoint.step for checkpoint in found}:
                found.append(Checkpoint(folder, folder, step))
    return Found(sorted(found, key=lambda checkpoint: checkpoint.step), note, error)


def select_checkpoints(
    checkpoints: Sequence[Checkpoint], steps: Collection[int] | None, every: int | None
) -> list[Checkpoint]:
    """The checkpoints at these steps, at multiples of ``every``, or all; ConfigError if one is missing or none left."""
    run, known = checkpoints[0].run, [checkpoint.step for checkpoint in checkpoints]
    listed = ", ".join(map(str, known))
    missing = sorted(set(steps or ()) - set(known))
    if missing:
        raise ConfigError(f"{run} has no checkpoint of step {', '.join(map(str, missing))} (--steps), only {listed}.")
    kept = [
        checkpoint
        for checkpoint in checkpoints
        if (steps is None or checkpoint.step in steps) and (every is None or checkpoint.step % every == 0)
    ]
    if not kept:
        raise ConfigError(f"{run} has no checkpoint at a multiple of {every} (--every), only at steps {listed}.")
    return kept


def find_storage(checkpoint: Checkpoint) -> str:
    """The storage format of its weights, one of those above; ConfigError if it is none of them."""
    folder = checkpoint.folder
    storage = SHARDS if checkpoint.shards else _recognize_storage(folder)
    if storage is not None:
        return storage
    names = sorted(path.name for path in folder.iterdir())
    listed = ", ".join(names[:_FILES_NAMED]) + (", ..." if len(names) > _FILES_NAMED else "") or "nothing"
    remedy = "Name a folder saved by save_pretrained, a Trainer, DeepSpeed, FSDP, PEFT or LLaVA."
    raise ConfigError(f"Found no weights in {folder}, only {listed}. {remedy}")


def find_dcp(folder: Path) -> Path | None:
    """The folder of torch.distributed.checkpoint's shards: this one or the Trainer's in it; None without."""
    places = [place for place in (folder, folder / _DCP_FOLDER) if (place / ".metadata").is_file()]
    return next((place for place in places if any(place.glob("*.distcp"))), None)


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object, empty if there is no file; ConfigError if it is damaged or no object."""
    try:
        require_file(path)
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it contains a {type(value).__name__}, not an object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"Could not read {path}: {error}. Save the checkpoint again.") from error
    return value


def read_trainer_state(checkpoint: Checkpoint) -> EvalRecord:
    """A record, without MIR, of epoch, loss and tokens at that step; ConfigError if the Trainer's state is damaged.

    Values of the wrong type are ignored.
    """
    state = read_json(checkpoint.folder / _TRAINER_STATE) or read_json(checkpoint.folder / NOTE_NAME)
    loss, loss_step = _find_newest_loss(state.get("log_history"), checkpoint.step)
    known = {"step": checkpoint.step, "mir": None, "epoch": state.get("epoch"), "loss": loss, "loss_step": loss_step}
    return EvalRecord.from_dict({**known, "tokens_seen": state.get("num_input_tokens_seen") or None}, [])


def compute_stamp(checkpoint: Checkpoint) -> str:
    """A hash of names, sizes and times of a checkpoint's files, which changes when it is saved again.

    In a run's own folder only the files directly in it count: these no longer change after training.
    """
    digest = hashlib.sha256()
    inner = checkpoint.folder.iterdir() if checkpoint.folder == checkpoint.run else checkpoint.folder.rglob("*")
    for path in sorted(path for path in inner if path.is_file() and not path.name.startswith("mir_")):
        known = path.stat()
        digest.update(f"{path.relative_to(checkpoint.folder)} {known.st_size} {known.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _locate(folder: Path) -> Path:
    """Resolve links, except one that is a run's checkpoint: that keeps its path in the run.

    A checkpoint may be on another disk with a link to it in the run, or have a link as a second name elsewhere: the run
    is the first of the link's folder and the target's folder that has files of a run.
    """
    if folder.name == _DCP_FOLDER:
        return _locate(folder.parent)
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
    """The checkpoint of a folder that is no run: a run's checkpoint, ZeRO shards in one, or a model."""
    shards = _SHARD_FOLDER.fullmatch(folder.name)
    if shards and _is_sharded(folder):
        return Checkpoint(folder.parent, _find_run(folder.parent), int(shards[1]), shards=folder.name)
    step = _read_step(folder)
    return Checkpoint(folder, _find_run(folder), step or 0, step_known=step is not None)


def _find_run(folder: Path, otherwise: Path | None = None) -> Path:
    if _LIGHTNING.fullmatch(folder.name):
        above = list(folder.parents)[:_LIGHTNING_LEVELS]
        return next((place for place in above if (place / FILE_NAME).exists()), otherwise or folder.parent)
    return folder.parent if _CHECKPOINT.fullmatch(folder.name) or (folder / NOTE_NAME).exists() else folder


def _read_step(folder: Path) -> int | None:
    """The step of the weights in a folder; None if it is not noted anywhere."""
    if numbered := _CHECKPOINT.fullmatch(folder.name) or _LIGHTNING.fullmatch(folder.name):
        return int(numbered[1])
    for name, field in ((_TRAINER_STATE, "global_step"), (NOTE_NAME, "step")):
        step = read_json(folder / name).get(field)
        if is_count(step):
            return step
    latest = folder / "latest"  # names DeepSpeed's newest shards
    try:
        if latest.is_file():
            require_file(latest)
        shards = _SHARD_FOLDER.fullmatch(latest.read_text(encoding="utf-8").strip() if latest.is_file() else "")
    except (OSError, ValueError) as error:
        raise ConfigError(f"Could not read {latest}: {error}. Name the shards: {folder / 'global_stepN'}") from error
    return int(shards[1]) if shards else None


def _recognize_storage(folder: Path) -> str | None:
    """The storage format; whole weights before shards, which are float32 also where training was in 16 bits."""
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
    if find_dcp(folder):
        return DCP
    return WHOLE if any((folder / name).is_file() for name in _WHOLE_FILES) else None  # Accelerate's save_state


def _is_sharded(folder: Path) -> bool:
    return any(folder.glob("*_model_states.pt"))


def _find_newest_loss(log: Any, upto: int) -> tuple[float | None, int | None]:
    """The last valid loss in a Trainer's log, up to a step, and its step."""
    for entry in reversed(log) if isinstance(log, list) else ():
        if not isinstance(entry, dict) or not is_number(entry.get("loss")):
            continue
        step = entry.get("step") if is_count(entry.get("step")) else None
        if step is None or step <= upto:
            return entry["loss"], step
    return None, None
