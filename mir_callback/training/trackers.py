# SPDX-License-Identifier: Apache-2.0
"""Where values go besides the history file: the Trainer's own log, or wandb directly."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

from mir_callback.collectives import describe
from mir_callback.training.history import Record

# Takes the values of one evaluation and the step they belong to.
Emit = Callable[[dict[str, float], int], None]


def log_values(record: Record) -> dict[str, float]:
    """What is logged of a record: `mir`, `mir_layer/01`.., `mir_seconds`; nothing if the evaluation failed.

    The Trainer's reporters put `train/` before each name. Layers count from 1, as in the history.
    """
    if record["mir"] is None:
        return {}
    width = max(2, len(str(len(record["per_layer"]))))
    layers = {f"mir_layer/{k:0{width}d}": value for k, value in enumerate(record["per_layer"], start=1)}
    return {"mir": record["mir"], **layers, "mir_seconds": record["seconds"]}


def through_trainer(trainer: Any) -> Emit:
    """Log through `Trainer.log`, which reaches every reporter and `state.log_history`.

    Logging clears `control.should_log`, which would swallow the loss of the same step: it is put back.

    Ranks: all, as `Trainer.log` is.
    """

    def emit(values: dict[str, float], _step: int) -> None:
        due = trainer.control.should_log
        try:
            trainer.log(values)
        finally:
            trainer.control.should_log = due

    return emit


def guarded(emit: Emit) -> Emit:
    """``emit``, but where it fails there is one warning and training goes on: the history file has every value.

    A reporter fails on the one rank that reports; raising there would leave the other ranks waiting.
    """
    failed = False

    def emit_or_warn(values: dict[str, float], step: int) -> None:
        nonlocal failed
        try:
            emit(values, step)
        except Exception as error:
            if not failed:
                warnings.warn(
                    f"step {step}: a reporter failed to log MIR, training goes on and the history file has the value; "
                    f"said once: {describe(error)}",
                    stacklevel=2,
                )
            failed = True

    return emit_or_warn


def to_wandb(values: dict[str, float], step: int) -> None:
    """Log to the active wandb run, if there is one, on the x axis the Trainer's own values use.

    Ranks: all; only the one that holds a run logs.
    """
    wandb = sys.modules.get("wandb")
    run = getattr(wandb, "run", None)
    if run is not None:
        run.log({**{f"train/{name}": value for name, value in values.items()}, "train/global_step": step})
