# SPDX-License-Identifier: Apache-2.0
"""Load checkpoints of others without running code that is in them."""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers.dynamic_module_utils as remote_code

from mir_callback.distributed import tensors_of
from mir_callback.errors import ConfigError

REMEDY = "If you trust whoever made it, pass --trust-checkpoint."
_SAFE_FROM = (2, 6)  # of torch; older versions run code of some files in spite of weights_only=True
# What DeepSpeed pickles with its shards beside tensors and plain values.
_KNOWN = (
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
)
_NAMED = re.compile(r"GLOBAL (\S+)")


# What is in the metadata of torch.distributed.checkpoint, beside plain values and dtypes.
_DCP = "torch.distributed.checkpoint"
_IN_METADATA = {
    *((f"{_DCP}.metadata", name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((f"{_DCP}.metadata", f"{kind}StorageMetadata") for kind in ("Bytes", "Chunk", "Tensor")),
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    (f"{_DCP}.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
}


class _MetadataUnpickler(pickle._Unpickler):
    """Makes nothing but what describes tensors, and changes nothing else: also a class that it may use has a state.

    In Python, as the one in C has no `load_build`, and allocates as many memo slots as a file asks for.
    """

    dispatch = dict(pickle._Unpickler.dispatch)

    def load_build(self) -> None:
        """See pickle."""
        changed = self.stack[-2]  # type: ignore[attr-defined]
        if isinstance(changed, type) or not dataclasses.is_dataclass(changed):
            raise pickle.UnpicklingError(f"it changes {changed!r}, which no metadata does")
        super().load_build()  # type: ignore[misc]

    def load_bytearray8(self) -> None:
        """Refused, as it fills memory of whatever size the file names."""
        raise pickle.UnpicklingError("it holds an array of bytes, which no metadata does")

    dispatch.update({pickle.BUILD[0]: load_build, pickle.BYTEARRAY8[0]: load_bytearray8})  # type: ignore[dict-item]

    def find_class(self, module: str, name: str) -> Any:
        """See pickle."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in _IN_METADATA:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it calls {module}.{name}, which no metadata needs, and could run code")


def load_metadata(path: Path) -> Any:
    """The `.metadata` of torch.distributed.checkpoint, a pickle, of which nothing runs; ConfigError if it is not one.

    torch itself would load it without any restriction.
    """
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        places = {info.relative_path for info in metadata.storage_data.values()}
        outside = [place for place in places if Path(place).name != place]
        if outside:
            raise pickle.UnpicklingError(f"it names files outside of its folder, {outside[0]!r}")
        sizes = [abs(math.prod(each.size)) * each.properties.dtype.itemsize for each in tensors_of(metadata).values()]
        stored = sum((path.parent / place).stat().st_size for place in places)
        if sum(sizes) > stored:
            raise pickle.UnpicklingError(f"its tensors have {sum(sizes)} bytes, its files {stored}")
    except Exception as error:  # of a damaged pickle: any kind
        raise ConfigError(f"Refused {path}: {' '.join(str(error).split())[-300:]}.") from error
    return metadata


@contextmanager
def refuse_code(folder: Path, *, trusted: bool) -> Iterator[None]:
    """Within it, no file that is loaded runs code, whatever the loader asks for: DeepSpeed, LLaVA, transformers, PEFT.

    All of them unpickle with `torch.load`, some with `weights_only=False`, and import Python files of a model through
    transformers. Both are replaced for this process meanwhile, so other threads must not load files of their own.

    Args:
        folder: of the checkpoint; named for a file without a name, such as a part of another one.
        trusted: let files run code instead.

    Raises:
        ConfigError: a file holds more than weights, or names Python code; also where a loader has caught that.
    """
    refused: list[ConfigError] = []
    load, import_class = torch.load, remote_code.get_class_in_module

    def refuse(message: str) -> ConfigError:
        refused.append(ConfigError(f"{message} {REMEDY}"))
        return refused[-1]

    def load_weights(f: Any, *args: Any, **options: Any) -> Any:
        if trusted:
            return load(f, *args, **{**options, "weights_only": False})
        name = f if isinstance(f, (str, os.PathLike)) else getattr(f, "name", f"a file in {folder}")
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _SAFE_FROM:
            raise refuse(
                f"{name} is a pickle, and torch {torch.__version__} may run code in one. Install torch >= 2.6, or "
                "save the checkpoint as safetensors."
            )
        known = [getattr(sys.modules[module], kind) for module, kind in _KNOWN if module in sys.modules]
        try:
            with torch.serialization.safe_globals(known):
                return load(f, *args, **{**options, "weights_only": True})
        except (pickle.UnpicklingError, RuntimeError) as error:
            words = str(error)
            if found := _NAMED.search(words):
                raise refuse(
                    f"Refused {name}: it calls {found[1]}, which no weights need, and could run code."
                ) from error
            if re.search("weights.only", words, re.IGNORECASE):
                why = " ".join(words.split())[-200:]
                raise refuse(
                    f"Refused {name}: it is damaged or no file of weights, and could run code ({why})."
                ) from error
            raise

    def import_trusted(class_name: str, module_path: Any, *args: Any, **options: Any) -> Any:
        if trusted:
            return import_class(class_name, module_path, *args, **options)
        raise refuse(f"Refused to load {class_name} from {module_path}: the checkpoint brings Python code of its own.")

    torch.load, remote_code.get_class_in_module = load_weights, import_trusted
    try:
        yield
    finally:
        torch.load, remote_code.get_class_in_module = load, import_class
        if refused:  # which a loader may have replaced by an error of its own, or passed over
            raise refused[0]
