# SPDX-License-Identifier: Apache-2.0
"""Load checkpoints of transformers' vision-language models: whole weights, PEFT adapters, shards of ZeRO or FSDP."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from mir_callback import distributed
from mir_callback.checkpoints.discover import (
    ADAPTER_CONFIG,
    DCP,
    PROJECTOR,
    PROJECTOR_FILE,
    SHARDS,
    WHOLE,
    Checkpoint,
    find_dcp,
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
from mir_callback.checkpoints.trust import REMEDY, load_metadata
from mir_callback.errors import ConfigError
from mir_callback.probe.adapters import HuggingFaceAdapter

_DTYPE_ARGUMENT = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
_COPY = 0.1  # of a model's weights, above which another model in the same shards may be the one to measure
_PEFT = "base_model.model."  # in the names of weights in a model with an adapter
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def opens(config: Mapping[str, Any]) -> bool:
    """Always: it is the last family to be tried."""
    return True


def open_checkpoint(checkpoint: Checkpoint, options: LoadOptions) -> Opened:
    """See :data:`mir_callback.checkpoints.load.FAMILIES`."""
    folder = checkpoint.folder
    if options.vision_dtype != AUTO:
        raise ConfigError(
            f"--vision-dtype {options.vision_dtype} is for models of the package llava, {folder} is one of "
            "transformers. Leave it out."
        )
    storage = find_storage(checkpoint)
    if storage == PROJECTOR:
        raise ConfigError(
            f"{folder} has {PROJECTOR_FILE}, but its config.json is not LLaVA's (no mm_vision_tower). Projectors of "
            "other code bases cannot be loaded."
        )
    places = [folder, checkpoint.run]
    if (folder / ADAPTER_CONFIG).is_file():
        named = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        base = fetch_base(folder, options.base, named, f"base_model_name_or_path in {ADAPTER_CONFIG}")
        places.append(base)
        model = _load_adapter(checkpoint, _load_whole(Checkpoint(base, base, 0), options), options)
    elif storage in (SHARDS, DCP):
        model, source = _load_shards(checkpoint, storage, options)
        places.append(source)
    else:
        model = _load_whole(checkpoint, options)
        places.append(_find_config(checkpoint, storage, options))
    how: dict[str, Any] = {
        "prompt": options.prompt,
        "text_positions": options.text_positions,
        "vision_ids": options.vision_ids,
    }
    return Opened(model, HuggingFaceAdapter(model, _load_processor(options, places), **how))


def _load_whole(checkpoint: Checkpoint, options: LoadOptions) -> nn.Module:
    folder = checkpoint.folder
    if find_storage(checkpoint) != WHOLE:
        raise ConfigError(
            f"The base model {folder} has no whole weights. Pass the model that training started from: --base."
        )
    place = _find_config(checkpoint, WHOLE, options)
    kind, given = _find_class(place, options), {}
    if place != folder:
        given["config"] = transformers.AutoConfig.from_pretrained(
            str(place), trust_remote_code=options.trust_checkpoint
        )
    return _load(checkpoint, kind, str(folder), DTYPES.get(options.dtype, AUTO), **given)


def _find_config(checkpoint: Checkpoint, storage: str, options: LoadOptions) -> Path:
    """The folder of a checkpoint's config.json: its own, else the base model's or the run's."""
    if (checkpoint.folder / "config.json").is_file():
        return checkpoint.folder
    if options.base is not None:
        return fetch_folder(options.base, weights=False, what="--base")
    if (checkpoint.run / "config.json").is_file():
        return checkpoint.run
    also = "" if checkpoint.run == checkpoint.folder else f", and {checkpoint.run} has none either"
    raise ConfigError(
        f"{checkpoint.folder} has {storage} without a config.json{also}. Pass a model of the same architecture: --base "
        "FOLDER_OR_HUB_NAME."
    )


def _read_config(folder: Path, options: LoadOptions) -> Any:
    return transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=options.trust_checkpoint)


def _load_shards(checkpoint: Checkpoint, storage: str, options: LoadOptions) -> tuple[nn.Module, Path]:
    """Load shards into the architecture of a config.json; returns the model and the folder of that file."""
    folder = _find_config(checkpoint, storage, options)
    kind = _find_class(folder, options)
    config = _read_config(folder, options)
    stored = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None) or torch.float32
    dtype = DTYPES.get(options.dtype, stored)
    with torch.device("meta"):
        names = kind(config).state_dict().keys() if storage == DCP else ()
    weights = read_dcp(checkpoint, names) if storage == DCP else read_shards(checkpoint)
    return _load(checkpoint, kind, None, dtype, config=config, state_dict=weights), folder


def _load(checkpoint: Checkpoint, kind: Any, source: str | None, dtype: Any, **given: Any) -> nn.Module:
    """`from_pretrained`, and a check that every weight was loaded."""
    given[_DTYPE_ARGUMENT] = dtype
    model, found = kind.from_pretrained(source, output_loading_info=True, **given)
    others = [*found.get("mismatched_keys", ()), *found.get("error_msgs", ())]
    require_complete(checkpoint, model, found["missing_keys"], found["unexpected_keys"], others)
    return model  # type: ignore[no-any-return]


def _find_class(folder: Path, options: LoadOptions) -> Any:
    """The model class that config.json names; ConfigError if it names kernels too, which are code."""
    config = read_json(folder / "config.json")
    for part in _walk(config):
        named = [str(value) for name, value in part.items() if "attn_implementation" in name]
        if any("/" in name for name in named) and not options.trust_checkpoint:
            raise ConfigError(f"{folder / 'config.json'} names code on the hub to run, {max(named)!r}. {REMEDY}")
    names = config.get("architectures")
    kind = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ConfigError(
            f"transformers {transformers.__version__} has no class {names} (architectures in "
            f"{folder / 'config.json'}). Install a version that has it, or use evaluate_mir in Python."
        )
    return kind


def _walk(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration and those within it, at any depth."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _walk(value)


def _load_adapter(checkpoint: Checkpoint, base: nn.Module, options: LoadOptions) -> nn.Module:
    """The base model with the adapter, not merged, as in training."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(f"The adapter in {checkpoint.folder} needs peft: {error}. Run pip install peft.") from error
    folder = str(checkpoint.folder)
    file = checkpoint.folder / ADAPTER_CONFIG
    if read_json(file).get("megatron_config") and not options.trust_checkpoint:
        raise ConfigError(f"{file} has a megatron_config, with which peft imports the module named in it. {REMEDY}")
    model: Any
    storage = find_storage(checkpoint)
    if storage in (SHARDS, DCP):  # trained weights must be in the shards, frozen ones may be
        config = peft.PeftConfig.from_pretrained(folder)
        config.inference_mode = False  # so that requires_grad shows which weights were trained
        model = peft.PeftModel(base, config)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        full, own = model.state_dict().keys(), peft.get_peft_model_state_dict(model).keys()
        weights = read_shards(checkpoint) if storage == SHARDS else read_dcp(checkpoint, full | own)
        if weights.keys() & (own - full):  # the Trainer saves an adapter alone by the names of PEFT's files
            require_complete(checkpoint, model, own - weights.keys(), weights.keys() - own)
            peft.set_peft_model_state_dict(model, weights)
        else:
            require_complete(checkpoint, model, trained - weights.keys(), weights.keys() - full)
            model.load_state_dict(weights, strict=False)
    else:
        model = peft.PeftModel.from_pretrained(base, folder)
        renamed = getattr(base, "_checkpoint_conversion_mapping", None)
        stored = peft.utils.load_peft_weights(folder, device="cpu", **({"key_mapping": renamed} if renamed else {}))
        own = peft.get_peft_model_state_dict(model)
        require_complete(checkpoint, model, own.keys() - stored.keys(), stored.keys() - own.keys())
    return model  # type: ignore[no-any-return]


def _load_processor(options: LoadOptions, places: list[Path]) -> Any:
    """The processor of the options, else the first one found in ``places``."""
    if options.processor is not None:
        folder = fetch_folder(options.processor, weights=False, what="--processor")
    else:
        found = [place for place in places if any((place / name).is_file() for name in _PROCESSOR_FILES)]
        if not found:
            raise ConfigError(
                f"Found no processor in {', '.join(str(place) for place in dict.fromkeys(places))}. Pass --processor "
                "FOLDER_OR_HUB_NAME. A Trainer with processing_class=processor saves it with each checkpoint."
            )
        folder = found[0]
    try:
        processor = transformers.AutoProcessor.from_pretrained(str(folder), trust_remote_code=options.trust_checkpoint)
    except Exception as error:  # of transformers, of missing image libraries: any kind
        raise ConfigError(
            f"Could not load the processor in {folder}: {shorten_message(error)}. Pass the model's own: --processor "
            "FOLDER_OR_HUB_NAME."
        ) from error
    if any(getattr(processor, part, None) is None for part in ("tokenizer", "image_processor")):
        raise ConfigError(
            f"The processor in {folder} ({type(processor).__name__}) has no image_processor or no tokenizer. Pass the "
            "model's own: --processor FOLDER_OR_HUB_NAME."
        )
    return processor


def read_shards(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All weights of DeepSpeed's ZeRO shards (`global_stepN`), by their names in training, float32, on the CPU."""
    folder = checkpoint.folder
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise ConfigError(
            f"The ZeRO shards in {folder} need deepspeed: {error}. Run pip install deepspeed, or merge them elsewhere "
            "with the zero_to_fp32.py beside them."
        ) from error
    tag = checkpoint.shards
    if tag is None and not (folder / "latest").is_file():
        found = sorted(path.name for path in folder.glob("global_step*"))
        if len(found) != 1:
            raise ConfigError(
                f"{folder} has no file `latest` that names its shards, and {len(found)} folders of shards "
                f"({', '.join(found) or 'none'}). Name one: {folder / (found[-1] if found else 'global_stepN')}"
            )
        tag = found[0]
    try:
        with redirect_stdout(io.StringIO()):  # it prints each step
            weights: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=tag)
    except Exception as error:  # any kind, for missing or damaged shards
        raise ConfigError(
            f"Could not merge the ZeRO shards in {folder}: {shorten_message(error)}. Check that the shards of every "
            "rank are there."
        ) from error
    return {name: torch.as_tensor(tensor) for name, tensor in weights.items()}


def read_dcp(checkpoint: Checkpoint, names: Collection[str]) -> dict[str, Tensor]:
    """The weights of FSDP's shards by the names of a model, on the CPU in their own dtype; optimizers are left out.

    What else was saved, and how the model was called in it, does not matter: its weights are those whose names end
    with the model's, and all others that are called as part of it. ConfigError if there is no such model among them,
    or several.
    """
    folder = find_dcp(checkpoint.folder)
    assert folder is not None
    metadata = load_metadata(folder / ".metadata")
    stored = distributed.tensors_of(metadata).keys()
    if any(_PEFT in name for name in stored) and not any(_PEFT in name for name in names):
        raise ConfigError(
            f"{folder} has weights of a PEFT adapter, but {checkpoint.folder} no {ADAPTER_CONFIG}: the Trainer leaves "
            f'it out under FSDP. Write it: model.peft_config["default"].save_pretrained("{checkpoint.folder}").'
        )
    hits: Counter[str] = Counter()
    for name in stored:
        starts = [0, *(place + 1 for place, sign in enumerate(name) if sign == ".")]
        hits.update(name[:start] for start in starts if name[start:] in names)
    # Averaged weights may be whole where the model itself lacks its frozen ones: the largest may be the wrong one.
    found = sorted(prefix for prefix, count in hits.items() if count > max(hits.values()) * _COPY)
    if len(found) != 1:
        what = (
            f"several models (named {', '.join(prefix or 'without a prefix' for prefix in found)})"
            if found
            else f"no weight {min(names)}, only {', '.join(sorted(stored)[:3])}"
        )
        raise ConfigError(
            f"{folder} has {what}, so the weights cannot be told. Save the model with save_pretrained, whole, and "
            "evaluate that."
        )
    tops = {name.partition(".")[0] for name in names}  # without a prefix, optimizers are told by theirs
    wanted = [name for name in stored if name.startswith(found[0]) and (found[0] or name.partition(".")[0] in tops)]
    weights = distributed.read_checkpoint(folder, metadata, wanted)
    return {name.removeprefix(found[0]): tensor for name, tensor in weights.items()}


def read_weights(folder: Path, part: str) -> dict[str, Tensor]:
    """The weights saved by save_pretrained whose names contain ``part``, on the CPU in their own dtype."""
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
