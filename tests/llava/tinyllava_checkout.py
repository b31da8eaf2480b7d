# SPDX-License-Identifier: Apache-2.0
"""What a TinyLLaVA Factory checkout needs to run on a newer Python and without a GPU; its files stay as they are."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

import torch


def help_on_newer_python() -> None:
    """Let its templates be defined: from 3.11 on, a dataclass takes no unhashable defaults."""
    original: Any = dataclasses.dataclass

    def dataclass(cls: Any = None, /, **options: Any) -> Any:
        if cls is not None and cls.__module__ == "tinyllava.data.template.formatter":
            options["unsafe_hash"] = True
        return original(cls, **options)

    dataclasses.dataclass = dataclass


def help_on_cpu() -> None:
    """Stand in for what only a GPU has: CUDA to wait for, and the process group its logging asks for a rank."""
    torch.cuda.synchronize = lambda *_: None
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
