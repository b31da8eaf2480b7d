# SPDX-License-Identifier: Apache-2.0
"""Run an example of a loop in this process; `running FOLDER` runs all of them, as one of the ranks of torchrun."""

from __future__ import annotations

import hashlib
import importlib
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch.callbacks import Callback

from mir_callback import MIRMonitor, PlateauRule, evaluate_mir
from mir_callback.history import read_history
from mir_callback.integrations.lightning import MIRLightningCallback
from tests.distributed.launch import ROOT, write_rank
from tests.training.digest import digest

# What watches in each of them.
WATCHERS: dict[str, Any] = {
    "plain_loop": MIRMonitor,
    "accelerate_loop": MIRMonitor,
    "titan_loop": MIRMonitor,
    "lightning_module": MIRLightningCallback,
}
EXAMPLES = list(WATCHERS)
SOME_SLOW = [pytest.param(name, marks=pytest.mark.slow) if name == "titan_loop" else name for name in EXAMPLES]
EVERY, ACCUMULATION = 2, 2
STEPS = 5
# Options of the watcher that are not the example's own, and its command line. None: nobody watches.
# A plateau is there from the start: the learning rate is 0.
SCRIPT: dict[str, Any] = {
    "plain": (None,),
    "watched": ({"keep_best": True},),
    "stopped": ({"stop": PlateauRule(window=4, warmup=2)}, "--learning-rate", "0", "--steps", "14"),
}


class Nobody:
    """A monitor that does nothing."""

    def step(self, *given: Any, **named: Any) -> SimpleNamespace:
        return SimpleNamespace(stop=False)

    def close(self) -> None:
        pass


def example(name: str) -> Any:
    """The example as a module."""
    if str(ROOT / "examples") not in sys.path:
        sys.path.append(str(ROOT / "examples"))
    return importlib.import_module(name)


def whole(weight: torch.Tensor) -> torch.Tensor:
    """A weight that FSDP2 has sharded, put together; any other itself."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def run(name: str, folder: Path, options: dict[str, Any] | None, *arguments: str) -> dict[str, Any]:
    """Run an example in this process; what it left, and the value of the weights at its end.

    A loss for each step: of the micro-batches that Lightning tells of, the last of a step.
    """
    module, watcher = example(name), WATCHERS[name]  # importing it draws random numbers

    def watch(*given: Any, **named: Any) -> Any:
        if options is None:
            return Callback() if name == "lightning_module" else Nobody()
        return watcher(*given, **{**named, **options})

    setattr(module, watcher.__name__, watch)
    random.seed(4)
    np.random.seed(4)
    model, losses = module.main(["--output", str(folder), "--steps", str(STEPS), *arguments])
    streams = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    found = {
        "losses": losses[ACCUMULATION - 1 :: ACCUMULATION] if name == "lightning_module" else losses,
        "weights": digest({name: whole(weight) for name, weight in model.state_dict().items()}),
        "flags": [each.training for each in model.modules()],
        "random": [hashlib.sha256(repr(stream).encode()).hexdigest() for stream in streams],
        "history": [],
    }
    if options is not None:
        vlm = getattr(model, "vlm", model)
        found["mir"] = evaluate_mir(vlm, module.make_probe(), processor=module.make_model()[1]).mir
        found["history"] = read_history(folder / "mir_history.jsonl")  # rank 0 has written it by now
    return found


def main(folder: str) -> None:
    """Every example watched in every way, in one process group, which Accelerate would end with its first."""
    Accelerator.end_training = lambda accelerator: [tracker.finish() for tracker in accelerator.trackers]
    found = {
        name: {what: run(name, Path(folder) / name / what, *how) for what, how in SCRIPT.items() if what != "plain"}
        for name in EXAMPLES
    }
    rank = torch.distributed.get_rank()
    model, processor = example("plain_loop").make_model()
    monitor = MIRMonitor(model, example("plain_loop").make_probe(), processor=processor, output_dir=folder, every=1)
    monitor.step(1, loss=float(rank))
    write_rank(folder, rank, {**found, "history": monitor.history})


if __name__ == "__main__":
    main(*sys.argv[1:])
