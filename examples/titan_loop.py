# SPDX-License-Identifier: Apache-2.0
"""Watch MIR in a Trainer class of one's own, built like torchtitan's: a config, a train_step, FSDP2, DCP checkpoints.

    .venv/bin/python examples/titan_loop.py
    OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc_per_node 2 examples/titan_loop.py
    .venv/bin/python examples/titan_loop.py --resume --steps 60

A tiny LLaVA with random weights, nothing is downloaded, seconds on two cores. Several processes shard it with
`fully_shard`; one does not. MIR is what stands between the marks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny_llava.collator import CaptionCollator
from tiny_llava.untrained import make_data, make_model, make_probe, parse_options, say_where
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from mir_callback import MIRMonitor, PlateauRule


@dataclass
class Config:
    """One training job."""

    output: Path
    steps: int
    learning_rate: float
    resume: bool
    batch: int = 4
    accumulation: int = 2
    save_every: int = 10
    # --- MIR ---
    mir_every: int = 2
    # -----------


class Trainer:
    """Trains a vision-language model; its state is what a checkpoint holds."""

    def __init__(self, config: Config) -> None:
        self.config, self.step = config, 0
        if "RANK" in os.environ and not dist.is_initialized():
            dist.init_process_group("gloo")
        self.rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.model, processor = make_model()
        if ranks > 1:
            mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("dp_shard",))
            for layer in self.model.model.language_model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.learning_rate)
        data = make_data(config.steps * config.accumulation * config.batch * ranks)
        sampler = DistributedSampler(data, ranks, self.rank, shuffle=False)
        collate, own = CaptionCollator(processor), torch.Generator()  # a loader draws a number when it begins
        self.loader = DataLoader(data, config.batch, sampler=sampler, collate_fn=collate, generator=own)
        torch.manual_seed(self.rank)
        if config.resume:
            self.load()
        # --- MIR ---
        self.mir = MIRMonitor(
            self.model,
            make_probe(),
            processor=processor,
            optimizer=self.optimizer,
            output_dir=config.output,
            total_steps=config.steps,
            start_step=self.step,
            every=config.mir_every,
            stop=PlateauRule(),
        )
        # -----------

    def train(self) -> list[float]:
        """Train; returns the loss of each step on this rank."""
        losses: list[float] = []
        batches = iter(self.loader)
        for _ in range(self.step * self.config.accumulation):
            next(batches)
        while self.step < self.config.steps:
            loss = self.train_step([next(batches) for _ in range(self.config.accumulation)])
            losses.append(loss.item())
            if self.step % self.config.save_every == 0:
                self.save()
            # --- MIR ---
            if self.mir.step(self.step, loss=loss).stop:  # every rank
                break
            # -----------
        # --- MIR ---
        self.mir.close()
        # -----------
        return losses

    def train_step(self, batches: list[dict[str, Tensor]]) -> Tensor:
        """One optimizer step; returns the loss of the last micro-batch."""
        for batch in batches:
            loss: Tensor = self.model(**batch).loss
            (loss / len(batches)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.detach()

    def save(self) -> None:
        """Every rank writes its shards."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer, "step": self.step}, checkpoint_id=self.checkpoint)
        torch.save(torch.get_rng_state(), self.checkpoint / f"random_{self.rank}.pt")

    def load(self) -> None:
        """Go on from the checkpoint."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "step": 0}
        dcp.load(state, checkpoint_id=self.checkpoint)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.step = state["step"]
        torch.set_rng_state(torch.load(self.checkpoint / f"random_{self.rank}.pt"))

    @property
    def checkpoint(self) -> Path:
        """The folder of the newest one."""
        return self.config.output / "checkpoint"


def main(arguments: Sequence[str] | None = None) -> tuple[nn.Module, list[float]]:
    """Train; returns the model and the loss of each step on this rank."""
    options = parse_options(__doc__, arguments, "runs/titan_loop")
    trainer = Trainer(Config(options.output, options.steps, options.learning_rate, options.resume))
    losses = trainer.train()
    if trainer.rank == 0:
        say_where(options.output)
    return trainer.model, losses


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
