# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of transformers' own vision-language models: whole, as a PEFT adapter, as DeepSpeed ZeRO shards."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from mir_callback.checkpoints.discover import (
    ADAPTER,
    ADAPTER_CONFIG,
    PROJECTOR,
    SHARDS,
    Checkpoint,
    read_json,
    storage_of,
)
from mir_callback.checkpoints.load import (
    AUTO,
    DTYPES,
    LoadOptions,
    Opened,
    base_of,
    folder_of,
    has_processor,
    one_line,
    require_complete,
)
from mir_callback.errors import ConfigError
from mir_callback.probe.adapters import HuggingFaceAdapter


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


_KINDS = (("model", ".safetensors"), ("pytorch_model", ".bin"))


def stored_weights(folder: Path, part: str) -> dict[str, Tensor]:
    """The weights of a folder whose names hold ``part``, on the CPU in their own dtype.

    Args:
        folder: as save_pretrained writes it, in one file or several with an index.
        part: of the names.

    Raises:
        ConfigError: the index is damaged.

    Ranks: any.
    """
    for stem, suffix in _KINDS:
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            places = read_json(index).get("weight_map", {})
            files = {folder / file for name, file in places.items() if part in name}
        else:
            files = {folder / f"{stem}{suffix}"}
        if index.is_file() or all(file.is_file() for file in files):
            read = _from_safetensors if suffix == ".safetensors" else _from_pickle
            return {name: tensor for file in sorted(files) for name, tensor in read(file, part).items()}
    return {}


def _from_safetensors(file: Path, part: str) -> dict[str, Tensor]:
    with safe_open(file, framework="pt", device="cpu") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys() if part in name}  # noqa: SIM118


def _from_pickle(file: Path, part: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {name: tensor for name, tensor in weights.items() if part in name}


_DTYPE_ARGUMENT = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"


def opens(config: Mapping[str, Any]) -> bool:
    """Everything that no other family opens."""
    return True


def open_checkpoint(checkpoint: Checkpoint, options: LoadOptions) -> Opened:
    """See :class:`mir_callback.checkpoints.load.Family`."""
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
        model = _from_shards_transformers_family(checkpoint, options)
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


def _from_shards_transformers_family(checkpoint: Checkpoint, options: LoadOptions) -> nn.Module:
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
