# SPDX-License-Identifier: Apache-2.0
"""One rank of a run that evaluates by the clock, then of a dry run: `schedule_worker FOLDER`.

Every rank but the first has a clock that runs a thousand times as fast, and the first one a reporter that fails.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from mir_callback import MIRCallback, Probe, TimeShare, monitor
from mir_callback.clock import Clock
from tests.distributed.launch import write_rank
from tests.logs import logged_here
from tests.samples import pairs
from tests.training.runs import losses, make_trainer


class FailsOnRank0(TrainerCallback):
    """A reporter, which only rank 0 has."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "mir" in logs and dist.get_rank() == 0:
            raise ConnectionError("no route")


def main(folder: str) -> None:
    """Train by the clock, rehearse, write what this rank saw."""
    probe = Probe.from_pairs(pairs(3))
    trainer = make_trainer(Path(folder) / "run", steps=40, ddp_backend="gloo")
    trainer.add_callback(FailsOnRank0())
    callback = MIRCallback(probe, every=TimeShare(0.3), also_on=("start", "end")).attach(trainer)
    speed = 1 if dist.get_rank() == 0 else 1000
    monitor.Clock = lambda: Clock(lambda: speed * time.perf_counter())
    with logged_here() as messages:
        trainer.train()
    monitor.Clock = Clock

    rehearsed = make_trainer(Path(folder) / "rehearsal", steps=40, ddp_backend="gloo")
    MIRCallback(probe, every=10, dry_run=True).attach(rehearsed)
    code: Any = "went on"
    try:
        rehearsed.train()
    except SystemExit as ended:
        code = ended.code
    write_rank(
        folder,
        dist.get_rank(),
        {
            "history": callback.history,
            "losses": losses(trainer),
            "warnings": sum("ConnectionError: no route" in message for message in messages),
            "exit": code,
            "steps": rehearsed.state.global_step,
            "left": sorted(os.listdir(Path(folder) / "rehearsal")) if (Path(folder) / "rehearsal").exists() else [],
        },
    )


if __name__ == "__main__":
    main(sys.argv[1])
