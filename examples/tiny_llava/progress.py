# SPDX-License-Identifier: Apache-2.0
"""Short lines that show how training goes, and the learning-rate curve of the backbones."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class Progress:
    """Prints ten lines over the training of a backbone: step, the values given, seconds so far."""

    def __init__(self, title: str, steps: int) -> None:
        self.title = title
        self.steps = steps
        self.step = 0
        self.started = time.perf_counter()

    def advance(self, **values: float) -> None:
        """Count one step; print a line at every tenth of the way."""
        self.step += 1
        if self.step % max(1, self.steps // 10) == 0 or self.step == self.steps:
            shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in values.items())
            self.tell(f"{self.step:>4}/{self.steps}  {shown}  ({time.perf_counter() - self.started:.0f} s)")

    def tell(self, what: str) -> None:
        """Print a line of this backbone."""
        print(f"  {self.title:<16}{what}", flush=True)


class LossLines(TrainerCallback):
    """Prints a line for each loss the Trainer logs, in place of its dictionaries."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print step and loss; other values have their own lines."""
        if state.is_world_process_zero and logs and "loss" in logs:
            print(f"step {state.global_step}/{state.max_steps}: loss {float(logs['loss']):.3f}", flush=True)


def warm_up_and_decay(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm up linearly over the first twentieth of the steps, then decay to zero along a cosine."""
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
