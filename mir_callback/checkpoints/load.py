# SPDX-License-Identifier: Apache-2.0
"""Open a checkpoint: the family it belongs to makes a model and an adapter of it, with every weight in its place."""

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
from mir_callback.errors import ConfigError, MIRError
from mir_callback.probe.adapters import Adapter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"
# Modules with `opens(config)`, whether a checkpoint with this config.json (empty if it has none) is of the family, and
# `open_checkpoint(checkpoint, options) -> Opened`, which raises MIRError. Asked in this order, and named instead of
# imported: llava_integration is the floor above, found when it is needed.
FAMILIES = ("llava_integration.checkpoints", "mir_callback.checkpoints.huggingface")

_SETTINGS = ["*.json", "*.model", "*.txt", "*.jinja"]
_SAFE, _PICKLED = "*.safetensors", ["pytorch_model*.bin", "adapter_model.bin", "mm_projector.bin"]
_KEYS_NAMED = 4
_MESSAGE_LENGTH = 300


@dataclass(frozen=True)
class LoadOptions:
    """How checkpoints are opened; None where the checkpoint or its family decides."""

    dtype: str = AUTO  # one of DTYPES, or that of the stored weights
    vision_dtype: str = AUTO  # of LLaVA's vision tower; AUTO is what LLaVA trains with
    base: str | None = None  # folder or hub name of the base model of a partial checkpoint
    processor: str | None = None  # folder or hub name of the processor, of the tokenizer for LLaVA
    conversation: str | None = None  # name of LLaVA's template


@dataclass(frozen=True)
class Opened:
    """A model on the CPU and what encodes a probe for it."""

    model: nn.Module
    adapter: Adapter


def open_checkpoint(checkpoint: Checkpoint, options: LoadOptions, device: torch.device) -> Opened:
    """A checkpoint's model on ``device``, in evaluation mode; MIRError if it cannot be opened completely."""
    config = read_json(checkpoint.folder / "config.json")
    families = (importlib.import_module(name) for name in FAMILIES)
    family: Any = next(family for family in families if family.opens(config))
    try:
        with redirect_stdout(sys.stderr):  # DeepSpeed and LLaVA say what they do on stdout
            opened: Opened = family.open_checkpoint(checkpoint, options)
            opened.model.to(device).eval()
    except MIRError:
        raise
    except Exception as error:  # of transformers, PEFT, DeepSpeed, safetensors, pickle, CUDA: any kind
        raise ConfigError(
            f"{checkpoint.folder} cannot be opened: {shorten_message(error)}; save it anew, or see whether it needs "
            "other versions of its packages"
        ) from error
    return opened


def is_local(name: str) -> bool:
    """Whether a name means a folder: there is one, or it cannot be a hub name."""
    return os.path.exists(os.path.expanduser(name)) or name.startswith((".", "/", "~")) or name.count("/") > 1


def fetch_folder(name: str, *, weights: bool = True, what: str = "the model") -> Path:
    """The folder that a name means, fetched if it is a hub name, weights as safetensors if there are any.

    ConfigError if it is neither; ``what`` it is stands in the message.
    """
    if is_local(name):
        folder = Path(os.path.expanduser(name))  # pathlib's own refuses the name of a user it does not know
        if not folder.is_dir():
            why = "is a file; name the folder it is in" if folder.exists() else "does not exist"
            raise ConfigError(f"{what} {folder} {why}")
        return folder
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*_SETTINGS, *([_SAFE] if weights else [])]))
        if weights and not any(folder.glob(_SAFE)):
            folder = Path(snapshot_download(name, allow_patterns=[*_SETTINGS, *_PICKLED]))
    except Exception as error:  # of the hub's client, of its connection, of the disk: any kind
        raise ConfigError(f"{what} {name} is no folder, and the hub fails: {shorten_message(error)}") from error
    return folder


def fetch_base(folder: Path, given: str | None, named: object, where: str) -> Path:
    """The folder of a partial checkpoint's base model: the one given, else that which its field ``where`` names."""
    name = given or named
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{folder} holds only a part of a model, and {where} does not name its base; give --base")
    try:
        return fetch_folder(name, what="the base model")
    except ConfigError as error:
        source = "--base" if given else where
        raise ConfigError(f"{folder} holds only a part of a model: {error} (named by {source}); give --base") from error


def require_complete(
    checkpoint: Checkpoint,
    model: nn.Module,
    missing: Collection[str],
    unexpected: Collection[str],
    others: Collection[object] = (),
) -> None:
    """Refuse a model whose weights are not all and only those of its checkpoint; ``others`` have e.g. other shapes."""
    buffers = {name for name, _ in model.named_buffers()}  # an older checkpoint has some that are not stored nowadays
    wrong = {"missing": missing, "unexpected": set(unexpected) - buffers, "not fitting": [str(each) for each in others]}
    listed = [f"{what} {_list_some(names)}" for what, names in wrong.items() if names]
    if listed:
        raise ConfigError(
            f"the weights of {checkpoint.folder} are not all and only those of {type(model).__name__}: "
            f"{'; '.join(listed)}; a model loaded so would be partly untrained: open it with the class and the "
            "versions it was saved with"
        )


def shorten_message(error: BaseException) -> str:
    """Class and message of a foreign error, whose message may be a page long, as one line."""
    words = " ".join(str(error).split())
    short = words if len(words) <= _MESSAGE_LENGTH else f"{words[:_MESSAGE_LENGTH]}..."
    return f"{type(error).__name__}: {short}"


def _list_some(names: Collection[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - _KEYS_NAMED} more" if len(listed) > _KEYS_NAMED else ""
    return f"{', '.join(listed[:_KEYS_NAMED])}{more}"
