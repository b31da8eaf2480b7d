# SPDX-License-Identifier: Apache-2.0
"""One rank of a training run in which something breaks: `train_worker FOLDER FAULT [SETUP [OPTIONS]]`."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import TrainerCallback, TrainerState

from mir_callback import MIRCallback, MIRMonitor, Probe, attach_mir
from tests import tiny_models
from tests.distributed.launch import write_rank
from tests.distributed.train_worker import deepspeed_config
from tests.logs import logged_here
from tests.samples import pairs
from tests.training.runs import collator, losses, make_trainer

STEPS = 8
EVERY = 2
FAULT_STEP = 4


class Within(TrainerCallback):
    """Breaks something in one rank's forwards while MIR evaluates at FAULT_STEP."""

    def __init__(self, module: torch.nn.Module, rank: int, fault: Callable[[], None]) -> None:
        self.step = 0
        self._rank, self._fault = rank, fault
        module.register_forward_hook(self._hook)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step + 1

    def _hook(self, *_: Any) -> None:
        if dist.get_rank() == self._rank and self.step == FAULT_STEP and not torch.is_grad_enabled():
            self._fault()


class FromStep(TrainerCallback):
    """Breaks something before FAULT_STEP and mends it after a number of steps."""

    def __init__(self, fault: Callable[[], None], mend: Callable[[], None] = lambda: None, steps: int = 1) -> None:
        self._fault, self._mend, self._end = fault, mend, FAULT_STEP + steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == FAULT_STEP - 1:
            self._fault()
        elif state.global_step == self._end:
            self._mend()


class Reporter(TrainerCallback):
    """A user's reporter that fails on MIR's values on the rank that reports."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "mir" in logs and state.is_world_process_zero:
            raise ConnectionError("the tracking server is gone")


def note(folder: Path) -> None:
    """Say when the fault happens, on a clock that all processes share."""
    (folder / "fault.txt").write_text(str(time.monotonic()))


def kill(folder: Path, number: int) -> None:
    """End this process as the system or an operator does."""
    note(folder)
    os.kill(os.getpid(), number)
    time.sleep(600)


def stall(folder: Path) -> None:
    """Hang, as a dead file system or a broken device does."""
    note(folder)
    time.sleep(600)


def fail(folder: Path) -> None:
    """Fail on this rank only."""
    note(folder)
    raise RuntimeError("a device error on one rank")


def poison(model: torch.nn.Module) -> None:
    """Diverge: NaN in the weights, on every rank alike."""
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.down_proj.weight.fill_(torch.nan)


def limit_files(folder: Path) -> None:
    """No file may grow beyond the history's size and a few bytes: writes fail in the middle of a line."""
    size = (folder / "run" / "mir_history.jsonl").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, resource.RLIM_INFINITY))


def free_files() -> None:
    """Lift the limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def fill_disk(folder: Path) -> None:
    """Leave no free byte on the disk of the run."""
    if dist.get_rank() == 0:
        with (folder / "run" / "ballast").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"x" * 512)
            except OSError:
                pass


def free_disk(folder: Path) -> None:
    """Make room again."""
    if dist.get_rank() == 0:
        (folder / "run" / "ballast").unlink()


def delete_folder(folder: Path) -> None:
    """Delete the run's folder."""
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "run")


def callback_of(fault: str, folder: Path, model: torch.nn.Module) -> TrainerCallback:
    """What brings a fault about."""
    layer = model.model.language_model.layers[1]
    faults: dict[str, Callable[[], TrainerCallback]] = {
        "none": TrainerCallback,
        "sigkill": lambda: Within(layer, 1, lambda: kill(folder, signal.SIGKILL)),
        "sigterm": lambda: Within(layer, 1, lambda: kill(folder, signal.SIGTERM)),
        "sigkill main": lambda: Within(layer, 0, lambda: kill(folder, signal.SIGKILL)),
        "stall": lambda: Within(layer, 1, lambda: stall(folder)),
        "fail": lambda: Within(layer, 1, lambda: fail(folder)),
        "fail at last": lambda: Within(model, 1, lambda: fail(folder)),  # after all collectives of the forward
        "poison": lambda: FromStep(lambda: poison(model)),
        "file limit": lambda: FromStep(lambda: limit_files(folder), free_files),
        "full disk": lambda: FromStep(lambda: fill_disk(folder), lambda: free_disk(folder), steps=3),
        "no folder": lambda: FromStep(lambda: delete_folder(folder)),
        "reporter": Reporter,
        "clock": lambda: FromStep((folder / "back").touch, lambda: (folder / "back").unlink(missing_ok=True)),
    }
    return faults[fault]()


def attach(trainer: Any, place: Path, num_samples: int = 6, **settings: Any) -> MIRCallback:
    """The callback, with a probe from this rank's own copy of the folders where there is one."""
    copy = place / f"copy{dist.get_rank()}"
    if copy.exists():
        return attach_mir(trainer, images=copy / "images", texts=copy / "texts", num_samples=num_samples, **settings)
    return MIRCallback(Probe.from_pairs(pairs(num_samples)), **settings).attach(trainer)


def train_under_fsdp2(folder: Path, fault: str, **settings: Any) -> None:
    """A loop of one's own: TrainingArguments refuse FSDP on a CPU."""
    dist.init_process_group("gloo")
    model, processor = tiny_models.llava()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*model.model.language_model.layers, model):
        fully_shard(part, mesh=mesh)
    breaking, state = callback_of(fault, folder, model), TrainerState()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    known = {"processor": processor, "optimizer": optimizer, "output_dir": folder / "run"}
    monitor = MIRMonitor(model, Probe.from_pairs(pairs(6)), **known, **settings)
    batch = collator(processor)(pairs(2, seed=9 + dist.get_rank()))
    for step in range(1, STEPS + 1):
        breaking.on_step_begin(None, state, None)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state.global_step = step
        monitor.step(step)
    monitor.close()
    write_rank(folder, dist.get_rank(), {"step": step, "history": monitor.history})


def main(folder: str, fault: str, setup: str = "ddp", options: str = "{}") -> None:
    """Train, then write what this rank saw."""
    place = Path(folder)
    settings = {"every": EVERY, "batch_size": 2, **json.loads(options)}
    if setup == "fsdp2":
        train_under_fsdp2(place, fault, **settings)
        return
    trainer = make_trainer(
        place / "run",
        steps=STEPS,
        deepspeed=deepspeed_config(setup),
        ddp_backend="gloo",
        learning_rate=0.0 if fault == "poison" else 3e-3,
        max_grad_norm=0.0 if fault == "poison" else 1.0,
    )
    trainer.add_callback(callback_of(fault, place, trainer.model))
    error, callback = None, None
    started = time.perf_counter()
    with logged_here() as messages:
        try:
            callback = attach(trainer, place, **settings)
            trainer.train()
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    seen = {
        "error": error,
        "seconds": time.perf_counter() - started,
        "step": trainer.state.global_step,
        "losses": losses(trainer),
        "history": callback.history if callback else [],
        "warnings": messages,
    }
    write_rank(folder, dist.get_rank(), seen)


if __name__ == "__main__":
    main(*sys.argv[1:])
    dist.destroy_process_group()  # left open, it may abort the process at its exit
