# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of transformers' own vision-language models: whole, as a PEFT adapter, as DeepSpeed ZeRO shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from mir_callback.checkpoints.adapters import base_of_adapter, with_adapter
from mir_callback.checkpoints.folders import (
    ADAPTER,
    ADAPTER_CONFIG,
    PROJECTOR,
    SHARDS,
    Checkpoint,
    read_json,
    storage_of,
)
from mir_callback.checkpoints.hub import folder_of, has_processor, one_line
from mir_callback.checkpoints.loading import AUTO, DTYPES, LoadOptions, Opened, require_complete
from mir_callback.checkpoints.shards import weights_of_shards
from mir_callback.errors import ConfigError
from mir_callback.probe.huggingface import HuggingFaceAdapter

_DTYPE_ARGUMENT = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"


def opens(config: Mapping[str, Any]) -> bool:
    """Everything that no other family opens."""
    return True


def open_checkpoint(checkpoint: Checkpoint, options: LoadOptions) -> Opened:
    """See :class:`mir_callback.checkpoints.loading.Family`."""
    for name in ("conversation", "vision_dtype"):
        if getattr(options, name) not in (None, AUTO):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} must be left out for {checkpoint.folder}, a model of transformers, got "
                f"{getattr(options, name)!r}; it is for models of the package llava"
            )
    storage = storage_of(checkpoint)
    if storage == PROJECTOR:
        raise ConfigError(
            f"{checkpoint.folder} must have the configuration of a LLaVA model (with mm_vision_tower) beside its "
            "mm_projector.bin, got one without; it was saved by a code base not known here"
        )
    more: list[Path] = []
    if (checkpoint.folder / ADAPTER_CONFIG).is_file():
        base = base_of_adapter(checkpoint, options.base)
        model = with_adapter(checkpoint, _whole(Checkpoint(base, base, 0), options.dtype), sharded=storage == SHARDS)
        more = [base]
    elif storage == SHARDS:
        model = _from_shards(checkpoint, options)
    else:
        model = _whole(checkpoint, options.dtype)
    return Opened(model, _adapter(model, checkpoint, options, more))


def _whole(checkpoint: Checkpoint, dtype: str) -> nn.Module:
    if storage_of(checkpoint) in (ADAPTER, SHARDS, PROJECTOR):
        raise ConfigError(
            f"the base model must be a folder of whole weights, got {checkpoint.folder}, which holds another kind; "
            "give --base the model that training started from"
        )
    model, found = _class_of(checkpoint.folder).from_pretrained(
        str(checkpoint.folder), output_loading_info=True, **_dtype(DTYPES.get(dtype, AUTO))
    )
    _require_loaded(checkpoint, model, found)
    return model  # type: ignore[no-any-return]


def _from_shards(checkpoint: Checkpoint, options: LoadOptions) -> nn.Module:
    """The architecture from the configuration, of which there is one beside a Trainer's shards or in the base."""
    has_own = (checkpoint.folder / "config.json").is_file()
    folder = checkpoint.folder if has_own else _configured(checkpoint, options)
    config = transformers.AutoConfig.from_pretrained(str(folder))
    dtype = DTYPES.get(options.dtype) or getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    model, found = _class_of(folder).from_pretrained(
        None,
        config=config,
        state_dict=weights_of_shards(checkpoint),
        output_loading_info=True,
        **_dtype(dtype or torch.float32),
    )
    _require_loaded(checkpoint, model, found)
    return model  # type: ignore[no-any-return]


def _configured(checkpoint: Checkpoint, options: LoadOptions) -> Path:
    """A folder with the configuration of shards that have none beside them."""
    if options.base is not None:
        return folder_of(options.base, weights=False, what="--base")
    if (checkpoint.run / "config.json").is_file():
        return checkpoint.run
    raise ConfigError(
        f"{checkpoint.folder} holds DeepSpeed shards without a config.json, and none is in {checkpoint.run}; "
        "give --base the folder or hub name of a model of the same architecture"
    )


def _adapter(model: nn.Module, checkpoint: Checkpoint, options: LoadOptions, more: list[Path]) -> HuggingFaceAdapter:
    """The adapter with the processor given, or the first one found beside the weights."""
    places = [checkpoint.folder, checkpoint.run, *more]
    if options.processor is not None:
        folder = folder_of(options.processor, weights=False, what="--processor")
    else:
        found = [place for place in places if has_processor(place)]
        if not found:
            raise ConfigError(
                f"a processor must be found for {checkpoint.folder}, got none in "
                f"{', '.join(str(place) for place in dict.fromkeys(places))}; give --processor a folder or hub name, "
                "and let the Trainer save it: processing_class=processor"
            )
        folder = found[0]
    try:
        processor = transformers.AutoProcessor.from_pretrained(str(folder))
    except Exception as error:  # of transformers, of missing image libraries: any kind
        raise ConfigError(
            f"--processor must be a processor that transformers can open, got {folder}: {type(error).__name__}: "
            f"{one_line(error)}; name the folder or hub name of the model's own"
        ) from error
    if any(getattr(processor, part, None) is None for part in ("tokenizer", "image_processor")):
        raise ConfigError(
            f"--processor must handle images and text (have image_processor and tokenizer), got {folder} with "
            f"{type(processor).__name__}; name the folder or hub name of the model's own"
        )
    return HuggingFaceAdapter(model, processor)


def _class_of(folder: Path) -> Any:
    """The class that a configuration names."""
    names = read_json(folder / "config.json").get("architectures") or []
    kind = getattr(transformers, str(names[0]), None) if names else None
    if kind is None:
        raise ConfigError(
            f"architectures in {folder / 'config.json'} must name a class of transformers {transformers.__version__}, "
            f"got {names}; install the transformers that has it, or measure it in Python with evaluate_mir"
        )
    return kind


def _dtype(dtype: Any) -> dict[str, Any]:
    return {_DTYPE_ARGUMENT: dtype}


def _require_loaded(checkpoint: Checkpoint, model: nn.Module, found: Mapping[str, Any]) -> None:
    others = [*found.get("mismatched_keys", ()), *found.get("error_msgs", ())]
    require_complete(checkpoint, model, found["missing_keys"], found["unexpected_keys"], others)
