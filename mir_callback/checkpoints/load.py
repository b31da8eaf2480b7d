# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint with the loader of its model family, and check that every weight was loaded."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Collection
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mir_callback.checkpoints.discover import Checkpoint, read_json
from mir_callback.checkpoints.trust import refuse_code
from mir_callback.errors import ConfigError, MIRError
from mir_callback.model.modality import AFTER_IMAGE
from mir_callback.probe.adapters import Adapter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"
# Modules with `opens(config)`, whether they load checkpoints with this config.json (empty if there is none), and
# `open_checkpoint(checkpoint, options) -> Opened`, which raises MIRError. Tried in this order; imported when needed, as
# llava_integration imports mir_callback.
FAMILIES = ("llava_integration.checkpoints", "mir_callback.checkpoints.huggingface")

_SETTINGS = ["*.json", "*.model", "*.txt", "*.jinja"]
_SAFE, _PICKLED = "*.safetensors", ["pytorch_model*.bin", "adapter_model.bin", "mm_projector.bin"]
_KEYS_NAMED = 4
_MESSAGE_LENGTH = 300


@dataclass(frozen=True)
class LoadOptions:
    """How checkpoints are loaded; None leaves it to the checkpoint or its family."""

    dtype: str = AUTO  # one of DTYPES; AUTO: that of the stored weights
    vision_dtype: str = AUTO  # of LLaVA's vision tower; AUTO: as in LLaVA's training
    base: str | None = None  # folder or hub name of the base model of a partial checkpoint
    processor: str | None = None  # folder or hub name of the processor (for LLaVA: tokenizer)
    prompt: str | None = None  # as MIRConfig.prompt
    text_positions: str = AFTER_IMAGE  # as MIRConfig.text_positions
    vision_ids: str | None = None  # as MIRConfig.vision_ids
    trust_checkpoint: bool = False  # run code that is in its files


@dataclass(frozen=True)
class Opened:
    """A loaded model, and the adapter that encodes probes for it."""

    model: nn.Module
    adapter: Adapter


def open_checkpoint(checkpoint: Checkpoint, options: LoadOptions, device: torch.device) -> Opened:
    """Load a checkpoint to ``device`` in eval mode; MIRError if that fails or weights are missing."""
    config = read_json(checkpoint.folder / "config.json")
    families = (importlib.import_module(name) for name in FAMILIES)
    family: Any = next(family for family in families if family.opens(config))
    try:
        # They print to stdout.
        with redirect_stdout(sys.stderr), refuse_code(checkpoint.folder, trusted=options.trust_checkpoint):
            opened: Opened = family.open_checkpoint(checkpoint, options)
            opened.model.to(device).eval()
    except MIRError:
        raise
    except Exception as error:  # of transformers, PEFT, DeepSpeed, safetensors, pickle, CUDA: any kind
        raise ConfigError(
            f"Could not load {checkpoint.folder}: {shorten_message(error)}. Save it again, or check the versions "
            "of the packages it needs."
        ) from error
    return opened


def is_local(name: str) -> bool:
    """Whether a name is a folder: it exists, or cannot be a hub name."""
    return os.path.exists(os.path.expanduser(name)) or name.startswith((".", "/", "~")) or name.count("/") > 1


def fetch_folder(name: str, *, weights: bool = True, what: str = "the model") -> Path:
    """The folder of a name, downloaded if it is a hub name (weights as safetensors if there are any).

    ConfigError, whose message calls it ``what``, if it is neither.
    """
    if is_local(name):
        folder = Path(os.path.expanduser(name))  # pathlib raises for unknown users
        if not folder.is_dir():
            why = "is a file. Name the folder it is in." if folder.exists() else "does not exist."
            raise ConfigError(f"{what} {folder} {why}")
        return folder
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*_SETTINGS, *([_SAFE] if weights else [])]))
        if weights and not any(folder.glob(_SAFE)):
            folder = Path(snapshot_download(name, allow_patterns=[*_SETTINGS, *_PICKLED]))
    except Exception as error:  # of the hub's client, of its connection, of the disk: any kind
        raise ConfigError(f"{what} {name} is no folder, and the hub failed: {shorten_message(error)}") from error
    return folder


def fetch_base(folder: Path, given: str | None, named: object, where: str) -> Path:
    """The folder of a partial checkpoint's base model: as ``given``, else as ``named`` in ``where``."""
    name = given or named
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{folder} has only part of a model, and {where} does not name its base model. Pass --base.")
    try:
        return fetch_folder(name, what="the base model")
    except ConfigError as error:
        source = "--base" if given else where
        raise ConfigError(
            f"{folder} has only part of a model, and its base model (from {source}) could not be opened. Pass another "
            f"--base. {error}"
        ) from error


def require_complete(
    checkpoint: Checkpoint,
    model: nn.Module,
    missing: Collection[str],
    unexpected: Collection[str],
    others: Collection[object] = (),
) -> None:
    """ConfigError if weights are missing, unexpected, or (``others``) do not fit, e.g. by their shape."""
    buffers = {name for name, _ in model.named_buffers()}  # which older versions stored in checkpoints
    wrong = {"missing": missing, "unexpected": set(unexpected) - buffers, "not fitting": [str(each) for each in others]}
    listed = [f"{what} {_list_some(names)}" for what, names in wrong.items() if names]
    if listed:
        raise ConfigError(
            f"The weights of {checkpoint.folder} do not match {type(model).__name__}: {'; '.join(listed)}. Such a "
            "model would be partly untrained. Load it with the class and package versions it was saved with."
        )


def shorten_message(error: BaseException) -> str:
    """Class and message of another package's error in one line, cut if it is long."""
    words = " ".join(str(error).split())
    short = words if len(words) <= _MESSAGE_LENGTH else f"{words[:_MESSAGE_LENGTH]}..."
    return f"{type(error).__name__}: {short}"


def _list_some(names: Collection[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - _KEYS_NAMED} more" if len(listed) > _KEYS_NAMED else ""
    return f"{', '.join(listed[:_KEYS_NAMED])}{more}"
