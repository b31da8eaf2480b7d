# SPDX-License-Identifier: Apache-2.0
"""One hash over many weights."""

from __future__ import annotations

import hashlib

import torch


def digest(weights: dict[str, torch.Tensor]) -> str:
    """Equal for the same names and values."""
    joined = hashlib.sha256()
    for name in sorted(weights):
        joined.update(f"{name} {tuple(weights[name].shape)}".encode())
        joined.update(weights[name].detach().cpu().float().contiguous().numpy().tobytes())
    return joined.hexdigest()
