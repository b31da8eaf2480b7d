# SPDX-License-Identifier: Apache-2.0
"""Run an example of a loop in this process; `running FOLDER` runs all of them, as one of the ranks of torchrun."""

from __future__ import annotations

import hashlib
import importlib
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from mir_callback import MIRMonitor, evaluate_mir
from mir_callback.history import read_history
from tests.distributed.launch import ROOT, write_rank
from tests.training.digest import digest

EXAMPLES = ["plain_loop", "accelerate_loop", "lightning_module"]
EVERY, ACCUMULATION = 2, 2
STEPS = 5
# What a plateau is that is there from the start: the learning rate is 0.
PLATEAU = ("--stop", "--learning-rate", "0", "--steps", "14")
SCRIPT = {"plain": ("--no-mir",), "watched": ("--keep-best",), "stopped": PLATEAU}


def example(name: str) -> Any:
    """The example as a module."""
    if str(ROOT / "examples") not in sys.path:
        sys.path.append(str(ROOT / "examples"))
    return importlib.import_module(name)


def run(name: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run an example in this process; what it left, and the value of the weights at its end.

    A loss for each step: of the micro-batches that Lightning tells of, the last of a step.
    """
    module = example(name)  # importing it draws random numbers
    random.seed(4)
    np.random.seed(4)
    model, losses = module.main(["--output", str(folder), "--steps", str(STEPS), *arguments])
    streams = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    found = {
        "losses": losses[ACCUMULATION - 1 :: ACCUMULATION] if name == "lightning_module" else losses,
        "weights": digest(model.state_dict()),
        "flags": [each.training for each in model.modules()],
        "random": [hashlib.sha256(repr(stream).encode()).hexdigest() for stream in streams],
        "history": [],
    }
    if "--no-mir" not in arguments:
        vlm = getattr(model, "vlm", model)
        found["mir"] = evaluate_mir(vlm, module.make_probe(), processor=module.make_model()[1]).mir
        found["history"] = read_history(folder / "mir_history.jsonl")  # rank 0 has written it by now
    return found


def main(folder: str) -> None:
    """Every example with every set of arguments, in one process group, which Accelerate would end with its first."""
    Accelerator.end_training = lambda accelerator: [tracker.finish() for tracker in accelerator.trackers]
    found = {
        name: {what: run(name, Path(folder) / name / what, *arguments) for what, arguments in SCRIPT.items()}
        for name in EXAMPLES
    }
    rank = torch.distributed.get_rank()
    model, processor = example("plain_loop").make_model()
    monitor = MIRMonitor(model, example("plain_loop").make_probe(), processor=processor, output_dir=folder, every=1)
    monitor.step(1, loss=float(rank))
    write_rank(folder, rank, {**found, "history": monitor.history})


if __name__ == "__main__":
    main(*sys.argv[1:])
