# SPDX-License-Identifier: Apache-2.0
"""One rank of a run of the real LLaVA training script: `train_worker FOLDER on|best|off PROBE -- its arguments`.

What the script can only do on a GPU is helped with here, and only here: accelerate 0.21 takes nccl and CUDA for
granted under DeepSpeed, the script synchronises CUDA before it saves, and no seed is set before its projector is made.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

import torch
from transformers import TrainerCallback

import llava_integration
from tests.distributed.launch import write_rank
from tests.training.digest import digest

NUM_SAMPLES, EVERY = 5, 2


def help_on_cpu() -> None:
    """Stand in for what only a GPU has."""
    torch.cuda.synchronize = lambda *_: None
    if "LOCAL_RANK" in os.environ:
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)


def count_images(trainer: Any) -> list[list[int]]:
    """From now on the number of images of every row of every training batch."""
    from llava.constants import IMAGE_TOKEN_INDEX

    counts: list[list[int]] = []
    collate = trainer.data_collator

    def counting(rows: Any) -> Any:
        batch = collate(rows)
        counts.append((batch["input_ids"] == IMAGE_TOKEN_INDEX).sum(dim=1).tolist())
        return batch

    trainer.data_collator = counting
    return counts


class Projectors(TrainerCallback):
    """A digest of the whole projector after every step, however it is sharded."""

    def __init__(self, digests: dict[int, str]) -> None:
        self._digests = digests

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        from llava.train.llava_trainer import get_mm_adapter_state_maybe_zero_3

        self._digests[state.global_step] = digest(
            get_mm_adapter_state_maybe_zero_3(model.named_parameters(), ["mm_projector"])
        )


def main(folder: str, watched: str, probe: str, *arguments: str) -> None:
    """Train as the script does, with one line before `trainer.train()`, and write what this rank saw."""
    help_on_cpu()
    torch.manual_seed(3)
    from llava.train import train
    from llava.train.llava_trainer import LLaVATrainer

    seen: dict[str, Any] = {"projectors": {}}
    original = LLaVATrainer.train

    def with_one_line(trainer: Any, *args: Any, **options: Any) -> Any:
        if watched != "off":
            seen["callback"] = llava_integration.attach_mir(
                trainer,
                images=Path(probe) / "images",
                texts=Path(probe) / "texts",
                num_samples=NUM_SAMPLES,
                every=EVERY if watched == "on" else 1,
                keep_best=watched == "best",
            )
            if watched == "best":
                trainer.add_callback(Projectors(seen["projectors"]))
        seen["trainer"] = trainer
        seen["images"] = count_images(trainer)
        return original(trainer, *args, **options)

    LLaVATrainer.train = with_one_line
    sys.argv = ["train.py", *arguments]
    train.train()
    trainer = seen["trainer"]
    write_rank(
        folder,
        int(os.environ.get("RANK", "0")),
        {
            "log": [[e["step"], e["loss"], e["learning_rate"]] for e in trainer.state.log_history if "loss" in e],
            "logged": [[e["step"], e["mir"]] for e in trainer.state.log_history if "mir" in e],
            "images": seen["images"],
            "projectors": seen["projectors"],
            "history": [record.to_dict() for record in seen["callback"].history] if "callback" in seen else [],
        },
    )


if __name__ == "__main__":
    main(*sys.argv[1:4], *sys.argv[5:])
