# SPDX-License-Identifier: Apache-2.0
"""Weights that DeepSpeed ZeRO has saved in shards, put together again."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor

from mir_callback.checkpoints.folders import Checkpoint
from mir_callback.checkpoints.hub import one_line
from mir_callback.errors import ConfigError


def weights_of_shards(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All weights by their names in training, float32, on the CPU.

    Args:
        checkpoint: a folder with `global_stepN` folders in it, as a Trainer or DeepSpeed's engine saves them.

    Raises:
        ConfigError: DeepSpeed is not installed, or cannot put the shards together.

    Ranks: any, each for itself.
    """
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise ConfigError(
            f"deepspeed must be installed to open the ZeRO shards in {checkpoint.folder}, got {error}; "
            "pip install deepspeed, or make whole weights of them elsewhere with the zero_to_fp32.py beside them"
        ) from error
    tag = checkpoint.shards or _only_folder(checkpoint.folder)
    try:
        with redirect_stdout(io.StringIO()):  # it tells its every step; its progress bars stay
            weights: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.folder), tag=tag)
    except Exception as error:  # missing and damaged shards lead to errors of any kind
        raise ConfigError(
            f"{checkpoint.folder} must hold all shards of a DeepSpeed checkpoint of ZeRO stage 1 to 3, got "
            f"{type(error).__name__}: {one_line(error)}; copy the shards of every rank into it"
        ) from error
    return {name: torch.as_tensor(tensor) for name, tensor in weights.items()}


def _only_folder(folder: Path) -> str | None:
    """The name of the shards' folder where DeepSpeed's own note of it is missing, None where there is one."""
    if (folder / "latest").is_file():
        return None
    found = sorted(path.name for path in folder.glob("global_step*"))
    if len(found) != 1:
        raise ConfigError(
            f"{folder} must say in `latest` which of its shards to open, got none and {json.dumps(found)}; "
            f"name one: {folder / (found[-1] if found else 'global_stepN')}"
        )
    return found[0]
