# SPDX-License-Identifier: Apache-2.0
"""Watch MIR in a training loop of one's own: plain PyTorch, on one process or under DistributedDataParallel.

    .venv/bin/python examples/plain_loop.py
    OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc_per_node 2 examples/plain_loop.py
    .venv/bin/python examples/plain_loop.py --resume --steps 60

A tiny LLaVA with random weights, nothing is downloaded, seconds on two cores. The loop has what real ones have:
gradient accumulation, checkpoints of its own, TensorBoard. MIR is what stands between the marks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from tiny_llava.collator import CaptionCollator
from tiny_llava.untrained import make_data, make_model, make_probe, parse_options, say_where
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.tensorboard import SummaryWriter

from mir_callback import MIRMonitor, PlateauRule

BATCH, ACCUMULATION, SAVE_EVERY = 4, 2, 10


def main(arguments: Sequence[str] | None = None) -> tuple[nn.Module, list[float]]:
    """Train; returns the model and the loss of each step on this rank."""
    options = parse_options(__doc__, arguments, "runs/plain_loop")
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    model, processor = make_model()
    model = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    data = make_data(options.steps * ACCUMULATION * BATCH * ranks)
    sampler = DistributedSampler(data, ranks, rank, shuffle=False)
    collate, own = CaptionCollator(processor), torch.Generator()  # a loader draws a number when it begins
    loader = DataLoader(data, BATCH, sampler=sampler, collate_fn=collate, generator=own)
    torch.manual_seed(rank)

    options.output.mkdir(parents=True, exist_ok=True)
    checkpoint = options.output / f"checkpoint_rank{rank}.pt"
    start = load(checkpoint, model, optimizer) if options.resume else 0
    writer = SummaryWriter(options.output, purge_step=start + 1) if rank == 0 else None

    # --- MIR ---
    monitor = MIRMonitor(
        model,
        make_probe(),
        processor=processor,
        optimizer=optimizer,
        output_dir=options.output,
        total_steps=options.steps,
        start_step=start,
        log=writer,
        every=2,
        stop=PlateauRule(),
    )
    # -----------

    losses = []
    for number, batch in enumerate(loader, start=1):
        step, is_last = number // ACCUMULATION, number % ACCUMULATION == 0
        if number <= start * ACCUMULATION:
            continue
        with nullcontext() if is_last or ranks == 1 else model.no_sync():
            loss = model(**batch).loss
            (loss / ACCUMULATION).backward()
        if not is_last:
            continue
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if writer is not None:
            writer.add_scalar("loss", loss, step)
        if step % SAVE_EVERY == 0:
            save(checkpoint, model, optimizer, step)
        # --- MIR ---
        if monitor.step(step, loss=loss).stop:  # every rank
            break
        # -----------
    # --- MIR ---
    monitor.close()
    # -----------

    if writer is not None:
        writer.close()
    if rank == 0:
        say_where(options.output)
    return model, losses


def save(path: os.PathLike, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """A checkpoint of this rank."""
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
    torch.save({"step": step, **states}, path)


def load(path: os.PathLike, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Go on from a checkpoint of this rank; returns its step."""
    states = torch.load(path)
    model.load_state_dict(states["model"])
    optimizer.load_state_dict(states["optimizer"])
    torch.set_rng_state(states["random"])
    return int(states["step"])


if __name__ == "__main__":
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
