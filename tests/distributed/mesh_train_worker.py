# SPDX-License-Identifier: Apache-2.0
"""One rank of a Trainer on a mesh: `mesh_train_worker FOLDER SETUP on|off`; SETUP is one of SETUPS."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DeepSpeedSequenceParallelConfig, DistributedType

from mir_callback import MIRCallback, Probe
from mir_callback.distributed import describe
from mir_callback.errors import ConfigError
from mir_callback.integrations.huggingface import TrainerSaver
from tests.distributed.launch import write_rank
from tests.distributed.mesh_worker import by_transformers
from tests.distributed.train_worker import digest
from tests.samples import pairs
from tests.training.runs import losses, make_trainer

SETUPS = ("transformers", "deepspeed", "ulysses 1", "ulysses 3")
NUM_SAMPLES = 7


def texts_alone(processor: Any) -> Callable[[list[Any]], dict[str, Any]]:
    """Batches that accelerate can split: it takes every tensor of them for one value a token."""

    def collate(items: list[Any]) -> dict[str, Any]:
        texts, options = [text for _, text in items], {"padding": "max_length", "max_length": 32}
        batch = dict(processor.tokenizer(texts, return_tensors="pt", return_token_type_ids=False, **options))
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["position_ids"] = torch.arange(32).expand(len(items), -1).contiguous()
        return batch

    return collate


def make(setup: str, folder: str) -> Any:
    """The Trainer of a setup."""
    options: dict[str, Any] = {"ddp_backend": "gloo"}
    name, _, stage = setup.partition(" ")
    if name != "transformers":
        options["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": int(stage or 1)},
            "zero_force_ds_cpu_optimizer": False,
            **({"tensor_parallel": {"autotp_size": 2}} if name == "deepspeed" else {}),
        }
    if name == "ulysses":
        handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
        options["parallelism_config"] = ParallelismConfig(sp_size=2, sp_backend="deepspeed", sp_handler=handler)

    def split(model: Any) -> Any:
        if name != "transformers":
            deepspeed.init_distributed("gloo")
            return model
        # Accelerate trains meshes on accelerators only.
        PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}
        saved = f"{folder}/model"
        if dist.get_rank() == 0:
            model.save_pretrained(saved)
        dist.barrier()
        return by_transformers(model, saved)

    trainer = make_trainer(Path(folder) / "run", steps=4, dropout=0.0, wrap=split, **options)
    if name == "ulysses":
        trainer.data_collator = texts_alone(trainer.processing_class)
    return trainer


def main(folder: str, setup: str, watched: str) -> None:
    """Train, then write what this rank saw."""
    trainer = make(setup, folder)
    callback = None
    if watched == "on":
        probe = Probe.from_pairs(pairs(NUM_SAMPLES), matched=True)
        callback = MIRCallback(probe, every=2, batch_size=2, vision_gain=True).attach(trainer)
    trainer.train()
    weights = {}
    for name, parameter in trainer.model.named_parameters():
        own = getattr(parameter, "ds_tensor", parameter).detach()  # of ZeRO-3 this rank's part
        weights[name] = own.full_tensor() if hasattr(own, "full_tensor") else own
    if dist.get_rank() == 0 and setup in ("transformers", "ulysses 1"):
        torch.save(weights, Path(folder) / "weights.pt")
    rng = int(torch.get_rng_state().long().sum())
    try:
        saver = type(TrainerSaver(trainer)).__name__
    except ConfigError as refusal:
        saver = describe(refusal)
    result = {"losses": losses(trainer), "weights": digest(weights), "rng": rng, "saver": saver}
    write_rank(folder, dist.get_rank(), {**result, "history": callback.history if callback else []})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
