# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the package `llava` for `mir eval`: a projector and its base model, or the whole model.

The model is built as in LLaVA's train.py, so that MIR is the same as during the run; LLaVA's own
`load_pretrained_model` casts everything to float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from llava_integration.common import is_llava_next, require_observable, surroundings
from llava_integration.llava import LlavaNextAdapter, OriginalLlavaAdapter
from mir_callback.checkpoints.discover import (
    ADAPTER_CONFIG,
    PROJECTOR,
    PROJECTOR_FILE,
    SHARDS,
    Checkpoint,
    find_storage,
    read_json,
)
from mir_callback.checkpoints.huggingface import read_shards, read_weights
from mir_callback.checkpoints.load import DTYPES, LoadOptions, Opened, fetch_base, fetch_folder, require_complete
from mir_callback.errors import ConfigError

_TOWER = "vision_tower."
_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json")


def opens(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model of the package `llava`: only those have these fields."""
    return not config.keys().isdisjoint({"mm_vision_tower", "mm_hidden_size", "mm_projector_type"})


def open_checkpoint(checkpoint: Checkpoint, options: LoadOptions) -> Opened:
    """See :data:`mir_callback.checkpoints.load.FAMILIES`."""
    folder, storage = checkpoint.folder, find_storage(checkpoint)
    if (folder / ADAPTER_CONFIG).is_file():
        raise ConfigError(
            f"{folder} is a LoRA checkpoint of LLaVA, which lacks the projector. Merge it with LLaVA's "
            "scripts/merge_lora_weights.py and evaluate the merged model."
        )
    config = _configuration(folder, options)
    places = [folder, checkpoint.run]
    if storage == PROJECTOR:
        named = read_json(folder / "config.json").get("_name_or_path")
        places.append(fetch_base(folder, options.base, named, "_name_or_path in config.json"))
    tokenizer = _tokenizer(options, places, config)
    if storage == PROJECTOR:
        model = _with_projector(checkpoint, config, options, places[-1], tokenizer)
    else:
        model = _whole(checkpoint, config, options, sharded=storage == SHARDS)
    usual = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float16  # train.py casts the tower to this
    model.get_vision_tower().to(dtype=DTYPES.get(options.vision_dtype, usual))
    require_observable(model)
    # A projector is of stage 1, but LLaVA's default is a template of stage 2.
    prompt = options.prompt or ("plain" if storage == PROJECTOR else None)
    adapter = LlavaNextAdapter if is_llava_next(model) else OriginalLlavaAdapter
    return Opened(model, adapter(model, tokenizer, prompt=prompt))


def _configuration(folder: Path, options: LoadOptions) -> Any:
    try:
        import llava.model  # noqa: F401  # registers its configurations
    except ImportError as error:
        raise ConfigError(
            f"Could not import the package llava, which is needed to open {folder}: {type(error).__name__}: {error}. "
            "Run mir eval in the environment in which the model was trained."
        ) from error
    try:
        return transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=options.trust_checkpoint)
    except ValueError as error:  # llava.model swallows its own import errors, and then nothing is registered
        kind = read_json(folder / "config.json").get("model_type")
        raise ConfigError(
            f"The package llava does not know model_type {kind!r} of {folder / 'config.json'}: {surroundings()}"
        ) from error


def _with_projector(checkpoint: Checkpoint, config: Any, options: LoadOptions, base: Path, tokenizer: Any) -> Any:
    """The base model with a trained projector, and with embeddings of new tokens if those were trained too."""
    file = checkpoint.folder / PROJECTOR_FILE
    weights: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    dtype = DTYPES.get(options.dtype) or next(iter(weights.values())).dtype  # config.json has the base model's
    trusted = options.trust_checkpoint
    config.vocab_size = transformers.AutoConfig.from_pretrained(str(base), trust_remote_code=trusted).vocab_size
    model, found = _class_of(config).from_pretrained(
        str(base), config=config, torch_dtype=dtype, output_loading_info=True
    )
    if len(tokenizer) > config.vocab_size:
        model.resize_token_embeddings(len(tokenizer))
    result = model.load_state_dict(weights, strict=False)
    missing = {name for name in found["missing_keys"] if _TOWER not in name} - weights.keys()
    unexpected = {name for name in found["unexpected_keys"] if _TOWER not in name} | set(result.unexpected_keys)
    require_complete(checkpoint, model, missing, unexpected, found["mismatched_keys"])
    model.get_vision_tower().load_model()
    return model


def _whole(checkpoint: Checkpoint, config: Any, options: LoadOptions, *, sharded: bool) -> Any:
    """The model with all weights from the checkpoint; LLaVA itself would load the tower's from its original model."""
    given: dict[str, Any] = {"torch_dtype": DTYPES.get(options.dtype, "auto")}
    if sharded:
        stored = read_shards(checkpoint)
        given |= {"state_dict": stored, "torch_dtype": DTYPES.get(options.dtype) or config.torch_dtype}
    else:
        stored = read_weights(checkpoint.folder, _TOWER)
    source = None if sharded else str(checkpoint.folder)
    model, found = _class_of(config).from_pretrained(source, config=config, output_loading_info=True, **given)
    model.get_vision_tower().load_model()
    of_tower = {name: tensor for name, tensor in stored.items() if _TOWER in name}
    model.load_state_dict(of_tower, strict=False)
    known = model.state_dict().keys()
    unexpected = [name for name in found["unexpected_keys"] if name not in of_tower or name not in known]
    missing = [name for name in found["missing_keys"] if _TOWER not in name]
    if of_tower:
        missing += [name for name in known if _TOWER in name and name not in of_tower]
    require_complete(checkpoint, model, missing, unexpected, found["mismatched_keys"])
    return model


def _class_of(config: Any) -> Any:
    return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _tokenizer(options: LoadOptions, places: list[Path], config: Any) -> Any:
    """The tokenizer with the tokens that train.py adds."""
    from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN

    if options.processor is not None:
        places = [fetch_folder(options.processor, weights=False, what="--processor")]
    folder = next((place for place in places if any((place / name).is_file() for name in _TOKENIZER_FILES)), None)
    if folder is None:
        listed = ", ".join(str(place) for place in dict.fromkeys(places))
        raise ConfigError(f"There is no tokenizer in {listed}. Name a folder or hub name with --processor.")
    trusted = options.trust_checkpoint
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), use_fast=False, trust_remote_code=trusted)
    if getattr(config, "mm_use_im_patch_token", False):
        tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True)
    if getattr(config, "mm_use_im_start_end", False):
        tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True)
    return tokenizer
