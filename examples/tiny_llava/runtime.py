# SPDX-License-Identifier: Apache-2.0
"""What a run needs from its surroundings: device, process group, environment variables that users may override."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import torch
import transformers


def number_of_processes() -> int:
    """How many processes torchrun has started."""
    return int(os.environ["WORLD_SIZE"])


def runs_on_cpu() -> bool:
    """Whether there are too few GPUs to give each process of this machine its own."""
    return torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"])


def set_up_deepspeed(cache: Path) -> None:
    """Set what DeepSpeed reads when it is imported."""
    # Private, because DeepSpeed fails to start on an extension that another installation has built.
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str((cache / "torch_extensions").absolute()))
    if runs_on_cpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def start_process_group() -> None:
    """Let DeepSpeed start the process group on the CPU.

    On GPUs the Trainer's arguments do this. On the CPU they start one that DeepSpeed doesn't know of yet when the model
    is loaded in shards.
    """
    if runs_on_cpu():
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def offline_wandb(folder: Path) -> None:
    """Let wandb write into ``folder`` and send nothing anywhere, unless told otherwise."""
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_DIR", str(folder.absolute()))
    os.environ.setdefault("WANDB_PROJECT", "mir-callback-demo")
    os.environ.setdefault("WANDB_SILENT", "true")


def quieten() -> None:
    """Leave out what libraries say when all is well; errors and this project's own warnings stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
