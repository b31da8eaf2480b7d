# SPDX-License-Identifier: Apache-2.0
"""PEFT adapters: weights beside a base model, saved by PEFT or left in DeepSpeed's shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from mir_callback.checkpoints.folders import ADAPTER_CONFIG, Checkpoint, read_json
from mir_callback.checkpoints.hub import base_of
from mir_callback.checkpoints.loading import require_complete
from mir_callback.checkpoints.shards import weights_of_shards
from mir_callback.errors import ConfigError


def base_of_adapter(checkpoint: Checkpoint, given: str | None) -> Path:
    """The folder of the model an adapter belongs to.

    Args:
        checkpoint: with the adapter's configuration.
        given: what the user says it is.

    Raises:
        ConfigError: nobody says, or it is not there.
    """
    named = read_json(checkpoint.folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    return base_of(checkpoint.folder, given, named, f"base_model_name_or_path in {ADAPTER_CONFIG}")


def with_adapter(checkpoint: Checkpoint, base: nn.Module, *, sharded: bool) -> nn.Module:
    """The base model with the adapter in place, not merged, as it was while it trained.

    Args:
        checkpoint: of the adapter.
        base: the model it belongs to; becomes part of what is returned.
        sharded: the adapter's weights are in DeepSpeed's shards.

    Raises:
        ConfigError: peft is not installed, or the adapter is not complete or of another model.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"peft must be installed to open the adapter in {checkpoint.folder}, got {error}; pip install peft"
        ) from error
    folder = str(checkpoint.folder)
    if sharded:
        return _from_shards(checkpoint, base, peft)
    model: Any = peft.PeftModel.from_pretrained(base, folder)
    renamed = getattr(base, "_checkpoint_conversion_mapping", None)
    stored = peft.utils.load_peft_weights(folder, device="cpu", **({"key_mapping": renamed} if renamed else {}))
    own = peft.get_peft_model_state_dict(model)
    require_complete(checkpoint, model, own.keys() - stored.keys(), stored.keys() - own.keys())
    return model  # type: ignore[no-any-return]


def _from_shards(checkpoint: Checkpoint, base: nn.Module, peft: Any) -> nn.Module:
    """What trained must be in the shards; frozen weights may be, and then go in as well."""
    config = peft.PeftConfig.from_pretrained(str(checkpoint.folder))
    config.inference_mode = False  # so that the model says which of its weights train
    model: nn.Module = peft.PeftModel(base, config)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    weights = weights_of_shards(checkpoint)
    result = model.load_state_dict(weights, strict=False)
    require_complete(checkpoint, model, trained - weights.keys(), result.unexpected_keys)
    return model
