# SPDX-License-Identifier: Apache-2.0
"""What lies in a folder: the checkpoints of a run, the step each was saved at, the way its weights are stored."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mir_callback.errors import ConfigError
from mir_callback.training.checkpoint import NOTE_NAME

# Ways to store weights.
WHOLE = "whole weights"
ADAPTER = "PEFT adapter"
PROJECTOR = "projector only"
SHARDS = "DeepSpeed ZeRO shards"

PROJECTOR_FILE = "mm_projector.bin"
ADAPTER_CONFIG = "adapter_config.json"
_WHOLE_FILES = tuple(
    f"{stem}{index}" for stem in ("model.safetensors", "pytorch_model.bin") for index in ("", ".index.json")
)
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_TRAINER_STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_SHARD_FOLDER = re.compile(r"global_step(\d+)")
_FILES_NAMED = 6


@dataclass(frozen=True)
class Checkpoint:
    """A folder with the weights of one step.

    Attributes:
        folder: where the weights and their configuration are.
        run: the output folder of the run they belong to; ``folder`` itself where there is none.
        step: the optimizer step they were saved after, 0 where nothing tells.
        shards: the folder of the ZeRO shards within ``folder``, if one was named.
    """

    folder: Path
    run: Path
    step: int
    shards: str | None = None

    @property
    def name(self) -> str:
        """The folder as seen from its run."""
        return self.folder.name if self.folder == self.run else self.folder.relative_to(self.run).as_posix()


def checkpoints_in(folder: Path) -> list[Checkpoint]:
    """The checkpoints that a folder stands for, in order of steps.

    A run stands for every `checkpoint-N` in it, and for the weights in the run's folder itself if they are of another
    step; any other folder stands for itself.

    Ranks: any, each for itself.
    """
    folder = folder.resolve()
    numbered = [(path, _CHECKPOINT.fullmatch(path.name)) for path in folder.iterdir() if path.is_dir()]
    found = [Checkpoint(path, folder, int(match[1])) for path, match in numbered if match]
    found.sort(key=lambda checkpoint: checkpoint.step)
    if not found:
        return [_single(folder)]
    final = Checkpoint(folder, folder, _step_of(folder))
    if _stored_as(folder) is not None and final.step not in {checkpoint.step for checkpoint in found}:
        found.append(final)
    return found


def select(checkpoints: Sequence[Checkpoint], steps: Collection[int] | None, every: int | None) -> list[Checkpoint]:
    """The checkpoints at these steps, at multiples of ``every``, or all of them.

    Raises:
        ConfigError: there is none at one of the steps, or none is left.

    Ranks: pure.
    """
    known = [checkpoint.step for checkpoint in checkpoints]
    listed = ", ".join(map(str, known))
    lacking = sorted(set(steps or ()) - set(known))
    if lacking:
        raise ConfigError(f"--steps must be steps of checkpoints in {checkpoints[0].run} ({listed}), got {lacking}")
    kept = [
        checkpoint
        for checkpoint in checkpoints
        if (steps is None or checkpoint.step in steps) and (every is None or checkpoint.step % every == 0)
    ]
    if not kept:
        raise ConfigError(f"--every must leave a checkpoint of {checkpoints[0].run} ({listed}), got {every}")
    return kept


def storage_of(checkpoint: Checkpoint) -> str:
    """How the weights of a checkpoint are stored: WHOLE, ADAPTER, PROJECTOR or SHARDS.

    Raises:
        ConfigError: in no way known here; the message says what is there.
    """
    folder = checkpoint.folder
    stored = SHARDS if checkpoint.shards else _stored_as(folder)
    if stored is not None:
        return stored
    names = sorted(path.name for path in folder.iterdir())
    there = ", ".join(names[:_FILES_NAMED]) + (", ..." if len(names) > _FILES_NAMED else "") or "nothing"
    sharded = any(name.startswith("pytorch_model_fsdp") or name.endswith(".distcp") for name in names)
    remedy = (
        f"make whole weights of FSDP's shards: accelerate merge-weights {folder}/pytorch_model_fsdp_0 OUT"
        if sharded
        else "name a folder written by save_pretrained, a Trainer, DeepSpeed, PEFT or LLaVA"
    )
    raise ConfigError(f"{folder} must hold weights that can be opened, got {there}; {remedy}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty if there is no such file.

    Raises:
        ConfigError: damaged, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} must be a JSON file, got {error}; save the checkpoint anew") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(value).__name__}; save the checkpoint anew")
    return value


def state_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the Trainer knew when it saved: fields of a record, for what its state holds."""
    state = read_json(checkpoint.folder / _TRAINER_STATE) or read_json(checkpoint.folder / NOTE_NAME)
    log: list[Mapping[str, Any]] = state.get("log_history") or []
    logged = [entry for entry in log if "loss" in entry and entry.get("step", 0) <= checkpoint.step]
    newest = logged[-1] if logged else {}
    fields = {"epoch": state.get("epoch"), "loss": newest.get("loss"), "loss_step": newest.get("step")}
    return {**fields, "tokens_seen": state.get("num_input_tokens_seen") or None}


def stamp_of(checkpoint: Checkpoint) -> str:
    """16 hexadecimal digits over names, sizes and times of a checkpoint's files; new when it is saved anew.

    Of a run's own folder only the files in it count, which change no more once training is over.
    """
    digest = hashlib.sha256()
    inner = checkpoint.folder.iterdir() if checkpoint.folder == checkpoint.run else checkpoint.folder.rglob("*")
    for path in sorted(path for path in inner if path.is_file() and not path.name.startswith("mir_")):
        known = path.stat()
        digest.update(f"{path.relative_to(checkpoint.folder)} {known.st_size} {known.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _single(folder: Path) -> Checkpoint:
    """A folder that is no run: a checkpoint of one, ZeRO shards in a checkpoint, or a model."""
    shards = _SHARD_FOLDER.fullmatch(folder.name)
    if shards and _is_sharded(folder):
        return Checkpoint(folder.parent, _run_of(folder.parent), int(shards[1]), shards=folder.name)
    return Checkpoint(folder, _run_of(folder), _step_of(folder))


def _run_of(folder: Path) -> Path:
    return folder.parent if _CHECKPOINT.fullmatch(folder.name) or (folder / NOTE_NAME).exists() else folder


def _step_of(folder: Path) -> int:
    numbered = _CHECKPOINT.fullmatch(folder.name)
    if numbered:
        return int(numbered[1])
    for name, field in ((_TRAINER_STATE, "global_step"), (NOTE_NAME, "step")):
        step = read_json(folder / name).get(field)
        if type(step) is int:
            return step
    named = _SHARD_FOLDER.fullmatch(_latest(folder))
    return int(named[1]) if named else 0


def _latest(folder: Path) -> str:
    """The shards that DeepSpeed calls its latest ones; empty where it does not say."""
    told = folder / "latest"
    return told.read_text(encoding="utf-8").strip() if told.is_file() else ""


def _stored_as(folder: Path) -> str | None:
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
