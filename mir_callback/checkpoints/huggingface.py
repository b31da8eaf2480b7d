# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of transformers' own vision-language models: whole, as a PEFT adapter, as DeepSpeed ZeRO shards."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from mir_callback.checkpoints.discover import (
    ADAPTER_CONFIG,
    PROJECTOR,
    PROJECTOR_FILE,
    SHARDS,
    WHOLE,
    Checkpoint,
    find_storage,
    read_json,
)
from mir_callback.checkpoints.load import (
    AUTO,
    DTYPES,
    LoadOptions,
    Opened,
    fetch_base,
    fetch_folder,
    require_complete,
    shorten_message,
)
from mir_callback.errors import ConfigError
from mir_callback.probe.adapters import HuggingFaceAdapter

_DTYPE_ARGUMENT = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def opens(config: Mapping[str, Any]) -> bool:
    """Everything that no other family opens."""
    return True


def open_checkpoint(checkpoint: Checkpoint, options: LoadOptions) -> Opened:
    """See :data:`mir_callback.checkpoints.load.FAMILIES`."""
    folder = checkpoint.folder
    for flag, value in (("--conversation", options.conversation), ("--vision-dtype", options.vision_dtype)):
        if value not in (None, AUTO):
            raise ConfigError(
                f"{flag} {value} is for models of the package llava, and {folder} is one of transformers; leave it out"
            )
    storage = find_storage(checkpoint)
    if storage == PROJECTOR:
        raise ConfigError(
            f"{folder} holds {PROJECTOR_FILE} without a configuration of LLaVA's (with mm_vision_tower) beside it; it "
            "was saved by a code base not known here"
        )
    places = [folder, checkpoint.run]
    if (folder / ADAPTER_CONFIG).is_file():
        named = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        base = fetch_base(folder, options.base, named, f"base_model_name_or_path in {ADAPTER_CONFIG}")
        places.append(base)
        model = _load_adapter(checkpoint, _load_whole(Checkpoint(base, base, 0), options), sharded=storage == SHARDS)
    elif storage == SHARDS:
        model = _load_shards(checkpoint, options)
    else:
        model = _load_whole(checkpoint, options)
    return Opened(model, HuggingFaceAdapter(model, _load_processor(options.processor, places)))


def _load_whole(checkpoint: Checkpoint, options: LoadOptions) -> nn.Module:
    folder = checkpoint.folder
    if find_storage(checkpoint) != WHOLE:
        raise ConfigError(
            f"the base model {folder} is no folder of whole weights; give --base the model that training started from"
        )
    return _load(checkpoint, _find_class(folder), str(folder), DTYPES.get(options.dtype, AUTO))


def _load_shards(checkpoint: Checkpoint, options: LoadOptions) -> nn.Module:
    """The architecture is from the configuration beside a Trainer's shards, or else of the base or the run."""
    folder = checkpoint.folder
    if not (folder / "config.json").is_file():
        if options.base is not None:
            folder = fetch_folder(options.base, weights=False, what="--base")
        elif (checkpoint.run / "config.json").is_file():
            folder = checkpoint.run
        else:
            raise ConfigError(
                f"{folder} holds DeepSpeed shards without a config.json, and none is in {checkpoint.run}; give --base "
                "the folder or hub name of a model of the same architecture"
            )
    kind, config = _find_class(folder), transformers.AutoConfig.from_pretrained(str(folder))
    stored = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    dtype = DTYPES.get(options.dtype, stored)
    return _load(checkpoint, kind, None, dtype, config=config, state_dict=read_shards(checkpoint))


def _load(checkpoint: Checkpoint, kind: Any, source: str | None, dtype: Any, **given: Any) -> nn.Module:
    """What `from_pretrained` makes, if every weight has found its place."""
    given[_DTYPE_ARGUMENT] = dtype
    model, found = kind.from_pretrained(source, output_loading_info=True, **given)
    others = [*found.get("mismatched_keys", ()), *found.get("error_msgs", ())]
    require_complete(checkpoint, model, found["missing_keys"], found["unexpected_keys"], others)
    return model  # type: ignore[no-any-return]


def _find_class(folder: Path) -> Any:
    """The class that a configuration names."""
    names = read_json(folder / "config.json").get("architectures")
    kind = getattr(transformers, str(names[0]), None) if names else None
    if kind is None:
        raise ConfigError(
            f"architectures in {folder / 'config.json'} names no class of transformers {transformers.__version__}: "
            f"{names}; install the transformers that has it, or measure it in Python with evaluate_mir"
        )
    return kind


def _load_adapter(checkpoint: Checkpoint, base: nn.Module, *, sharded: bool) -> nn.Module:
    """The base model with the adapter in place, not merged, as it was while it trained."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"the adapter in {checkpoint.folder} needs peft, which cannot be imported: {error}; pip install peft"
        ) from error
    folder = str(checkpoint.folder)
    model: Any
    if sharded:  # what trained must be in the shards; frozen weights may be, and then go in as well
        config = peft.PeftConfig.from_pretrained(folder)
        config.inference_mode = False  # so that the model says which of its weights train
        model = peft.PeftModel(base, config)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        weights = read_shards(checkpoint)
        result = model.load_state_dict(weights, strict=False)
        require_complete(checkpoint, model, trained - weights.keys(), result.unexpected_keys)
    else:
        model = peft.PeftModel.from_pretrained(base, folder)
        renamed = getattr(base, "_checkpoint_conversion_mapping", None)
        stored = peft.utils.load_peft_weights(folder, device="cpu", **({"key_mapping": renamed} if renamed else {}))
        own = peft.get_peft_model_state_dict(model)
        require_complete(checkpoint, model, own.keys() - stored.keys(), stored.keys() - own.keys())
    return model  # type: ignore[no-any-return]


def _load_processor(given: str | None, places: list[Path]) -> Any:
    """The processor given, or the first one found beside the weights."""
    if given is not None:
        folder = fetch_folder(given, weights=False, what="--processor")
    else:
        found = [place for place in places if any((place / name).is_file() for name in _PROCESSOR_FILES)]
        if not found:
            raise ConfigError(
                f"there is no processor in {', '.join(str(place) for place in dict.fromkeys(places))}; give "
                "--processor a folder or hub name, and let the Trainer save it: processing_class=processor"
            )
        folder = found[0]
    try:
        processor = transformers.AutoProcessor.from_pretrained(str(folder))
    except Exception as error:  # of transformers, of missing image libraries: any kind
        raise ConfigError(
            f"transformers cannot open the processor in {folder}: {shorten_message(error)}; give --processor the "
            "folder or hub name of the model's own"
        ) from error
    if any(getattr(processor, part, None) is None for part in ("tokenizer", "image_processor")):
        raise ConfigError(
            f"the processor in {folder}, a {type(processor).__name__}, does not handle images and text (has no "
            "image_processor or tokenizer); give --processor the folder or hub name of the model's own"
        )
    return processor


def read_shards(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All weights of DeepSpeed's shards (`global_stepN` folders) by their names in training, float32, on the CPU."""
    folder = checkpoint.folder
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise ConfigError(
            f"the ZeRO shards in {folder} need deepspeed, which cannot be imported: {error}; pip install deepspeed, or "
            "make whole weights of them elsewhere with the zero_to_fp32.py beside them"
        ) from error
    tag = checkpoint.shards
    if tag is None and not (folder / "latest").is_file():
        found = sorted(path.name for path in folder.glob("global_step*"))
        if len(found) != 1:
            raise ConfigError(
                f"nothing in {folder} (no file `latest`) says which of its shards to open: {', '.join(found) or 'none'}"
                f"; name one: {folder / (found[-1] if found else 'global_stepN')}"
            )
        tag = found[0]
    try:
        with redirect_stdout(io.StringIO()):  # it says its every step; its progress bars stay
            # NOTE: DeepSpeed unpickles the shards with weights_only=False: the one place here where a file that
            # somebody hands over could run code.
            weights: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=tag)
    except Exception as error:  # missing and damaged shards lead to errors of any kind
        raise ConfigError(
            f"{folder} does not hold all shards of a DeepSpeed checkpoint of ZeRO stage 1 to 3: "
            f"{shorten_message(error)}; copy the shards of every rank into it"
        ) from error
    return {name: torch.as_tensor(tensor) for name, tensor in weights.items()}


def read_weights(folder: Path, part: str) -> dict[str, Tensor]:
    """The weights that save_pretrained wrote whose names hold ``part``, on the CPU in their own dtype."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{whole}.index.json"
        places = read_json(index).get("weight_map", {}) if index.is_file() else {part: whole}
        files = sorted({folder / file for name, file in places.items() if part in name})
        if index.is_file() or files[0].is_file():
            return {name: tensor for file in files for name, tensor in _read_file(file, part)}
    return {}


def _read_file(file: Path, part: str) -> list[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt", device="cpu") as opened:
            return [(name, opened.get_tensor(name)) for name in opened.keys() if part in name]  # noqa: SIM118
    weights: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return [(name, tensor) for name, tensor in weights.items() if part in name]
