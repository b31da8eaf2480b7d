# SPDX-License-Identifier: Apache-2.0
"""The scalars of an evaluation, and their way through the Trainer's own log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mir_callback.training.history import Record, lowest_record


def log_values(record: Record, history: Sequence[Record] = ()) -> dict[str, float]:
    """What is logged of a record; nothing if the evaluation failed.

    The Trainer's reporters put `train/` before each name. Layers count from 1, as in the history.

    Args:
        record: the evaluation.
        history: all of the run's so far, for the best of them; ``record`` may be among them.

    Returns:
        `mir`, `mir_layer/01`.., `mir_seconds`, `mir_best`, `mir_best_step`, and `mir_time_share` if the record knows.
    """
    if record["mir"] is None:
        return {}
    width = max(2, len(str(len(record["per_layer"]))))
    layers = {f"mir_layer/{k:0{width}d}": value for k, value in enumerate(record["per_layer"], start=1)}
    best = best_record([*history, record])
    values = {"mir": record["mir"], **layers, "mir_seconds": record["seconds"]}
    values |= {"mir_best": best["mir"], "mir_best_step": best["step"]}
    spent = record.get("train_seconds", 0.0) + record.get("eval_seconds", 0.0)
    return values | ({"mir_time_share": record["eval_seconds"] / spent} if spent > 0 else {})


def best_record(history: Sequence[Record]) -> Record:
    """What :func:`lowest_record` finds, or before anything is trained the first with a value. One must have a value."""
    return lowest_record(history) or next(record for record in history if record["mir"] is not None)


def through_trainer(trainer: Any) -> Callable[[dict[str, float]], None]:
    """Log through `Trainer.log`, which reaches every reporter and `state.log_history`.

    Logging clears `control.should_log`, which would swallow the loss of the same step: it is put back.

    Ranks: all, as `Trainer.log` is.
    """

    def log(values: dict[str, float]) -> None:
        due = trainer.control.should_log
        try:
            trainer.log(values)
        finally:
            trainer.control.should_log = due

    return log
