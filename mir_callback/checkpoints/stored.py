# SPDX-License-Identifier: Apache-2.0
"""Single weights out of a folder of whole weights, whatever files they are in."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mir_callback.checkpoints.folders import read_json

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
