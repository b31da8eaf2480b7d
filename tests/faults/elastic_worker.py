# SPDX-License-Identifier: Apache-2.0
"""One rank of a run that goes on from its newest checkpoint: `elastic_worker FOLDER LAST_STEP [KILLED_STEP]`.

Checkpoints are written in the background. After LAST_STEP the process ends without a word, as when a job's time is up;
after KILLED_STEP the last rank is killed.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.nn.parallel import DistributedDataParallel

from mir_callback import MIRMonitor, PlateauRule, Probe
from tests import tiny_models
from tests.samples import pairs
from tests.training.runs import collator

STEPS, EVERY, SAVED_EVERY = 12, 2, 4
NUM_SAMPLES = 7


def newest(checkpoints: Path) -> int:
    """Step of the newest checkpoint that is complete: its metadata are written last."""
    return max((int(each.parent.name) for each in checkpoints.glob("*/.metadata")), default=0)


def main(run: str, last_step: str, killed_step: str = "0") -> None:
    """Train from the newest checkpoint on."""
    place, ranks = Path(run), int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if ranks > 1:
        dist.init_process_group("gloo")
    model, processor = tiny_models.llava()
    start = newest(place / "checkpoints")
    if start:
        weights = model.state_dict()
        dcp.load({"model": weights}, checkpoint_id=place / "checkpoints" / str(start))
        model.load_state_dict(weights)
    group = dist.new_group(backend="gloo") if ranks > 1 else None  # of the saving thread
    if ranks > 1:
        dist.barrier()  # before any rank writes another checkpoint
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if ranks > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = MIRMonitor(
        wrapped,
        Probe.from_pairs(pairs(NUM_SAMPLES)),
        processor=processor,
        optimizer=optimizer,
        output_dir=place / "run",
        total_steps=STEPS,
        start_step=start,
        every=EVERY,
        stop=PlateauRule(observe_only=True),
    )
    saving: Any = None
    for step in range(start + 1, int(last_step) + 1):
        batch = collator(processor)(pairs(2, seed=100 * step + rank))
        wrapped(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitor.step(step).record and rank == 0:
            torch.save(model.state_dict(), place / f"weights-{step}.pt")
        if step % SAVED_EVERY == 0:
            folder = place / "checkpoints" / str(step)
            saving = dcp.async_save({"model": model.state_dict()}, checkpoint_id=folder, process_group=group)
        if step == int(killed_step) and rank == ranks - 1:
            os.kill(os.getpid(), signal.SIGKILL)
    if saving is not None:
        saving.result()
    if int(last_step) < STEPS:
        os._exit(0)
    monitor.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
