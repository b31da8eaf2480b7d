# SPDX-License-Identifier: Apache-2.0
"""Open a checkpoint: the family it belongs to makes a model and an adapter of it, with every weight in its place."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Collection, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from mir_callback.checkpoints.folders import Checkpoint, read_json
from mir_callback.checkpoints.hub import one_line
from mir_callback.errors import ConfigError, MIRError
from mir_callback.probe.adapter import Adapter

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"
_KEYS_NAMED = 4


@dataclass(frozen=True)
class LoadOptions:
    """How checkpoints are opened; None where the checkpoint or its family decides.

    Attributes:
        dtype: one of DTYPES, or "auto" for that of the stored weights.
        vision_dtype: of LLaVA's vision tower, likewise; "auto" for what LLaVA trains with.
        base: folder or hub name of the base model of a partial checkpoint.
        processor: folder or hub name of the processor, of the tokenizer for LLaVA.
        conversation: name of LLaVA's template.
    """

    dtype: str = AUTO
    vision_dtype: str = AUTO
    base: str | None = None
    processor: str | None = None
    conversation: str | None = None


@dataclass(frozen=True)
class Opened:
    """A model on the CPU and what encodes a probe for it."""

    model: nn.Module
    adapter: Adapter


class Family(Protocol):
    """A module that opens the checkpoints of one family of models."""

    def opens(self, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this `config.json` (empty if it has none) is of this family."""
        ...

    def open_checkpoint(self, checkpoint: Checkpoint, options: LoadOptions) -> Opened:
        """Open it.

        Raises:
            MIRError: something is missing or does not fit; names the remedy.
        """
        ...


# Asked in this order. Named and not imported: llava_integration is the floor above, found when it is needed.
FAMILIES = ("llava_integration.checkpoints", "mir_callback.checkpoints.transformers_family")


def open_checkpoint(checkpoint: Checkpoint, options: LoadOptions, device: torch.device) -> Opened:
    """A checkpoint's model on ``device``, in evaluation mode.

    Raises:
        MIRError: it cannot be opened completely; the message says why, in one line.

    Ranks: any, each for itself.
    """
    config = read_json(checkpoint.folder / "config.json")
    families = (importlib.import_module(name) for name in FAMILIES)
    family: Any = next(family for family in families if family.opens(config))
    try:
        with redirect_stdout(sys.stderr):  # DeepSpeed and LLaVA tell what they do on stdout
            opened: Opened = family.open_checkpoint(checkpoint, options)
            opened.model.to(device).eval()
    except MIRError:
        raise
    except Exception as error:  # of transformers, PEFT, DeepSpeed, safetensors, pickle, CUDA: any kind
        raise ConfigError(
            f"{checkpoint.folder} must be a whole checkpoint that can be opened here, got {type(error).__name__}: "
            f"{one_line(error)}; save it anew, or see whether it needs other versions of its packages"
        ) from error
    return opened


def release() -> None:
    """Give the memory of a model that nothing refers to any more back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def require_complete(
    checkpoint: Checkpoint,
    model: nn.Module,
    missing: Collection[str],
    unexpected: Collection[str],
    others: Collection[object] = (),
) -> None:
    """Refuse a model whose weights are not all and only those of its checkpoint.

    Args:
        checkpoint: named in the message.
        model: its buffers that are not stored nowadays may be in an older checkpoint.
        missing: names of the model's that the checkpoint lacks.
        unexpected: names of the checkpoint's that the model lacks.
        others: whatever else went wrong, such as other shapes.

    Raises:
        ConfigError: something is left; the message names it.
    """
    buffers = {name for name, _ in model.named_buffers()}
    told = [
        f"{what} {_some(names)}"
        for what, names in (
            ("missing", missing),
            ("unexpected", set(unexpected) - buffers),
            ("not fitting", [str(other) for other in others]),
        )
        if names
    ]
    if told:
        raise ConfigError(
            f"the weights of {checkpoint.folder} must be all and only those of {type(model).__name__}, got "
            f"{'; '.join(told)}; a model loaded so would be partly untrained: open it with the class and the versions "
            "it was saved with"
        )


def _some(names: Collection[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - _KEYS_NAMED} more" if len(listed) > _KEYS_NAMED else ""
    return f"{', '.join(listed[:_KEYS_NAMED])}{more}"
