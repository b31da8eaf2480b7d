# SPDX-License-Identifier: Apache-2.0
"""The scalars of an evaluation, and their way through the Trainer's own log."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from mir_callback.training.history import Record, lowest_record

# What the stop rule expects of going on.
GAINS = ("expected_gain", "expected_gain_se")


def log_values(record: Record, history: Sequence[Record] = ()) -> dict[str, float]:
    """What is logged of a record; nothing if the evaluation failed.

    The Trainer's reporters put `train/` before each name. Layers count from 1, as in the history.

    Args:
        record: the evaluation.
        history: all of the run's so far, for the best of them; ``record`` may be among them.

    Returns:
        `mir`, `mir_layer/01`.., `mir_seconds`, `mir_best`, `mir_best_step`, and what the record knows of `mir_se`,
        `mir_extrapolated`, `mir_probe_loss`, `mir_probe_perplexity`, `mir_expected_gain`, `mir_expected_gain_se`,
        `mir_memory_gb`, `mir_time_share` and the :func:`summaries` of companions.
    """
    if record["mir"] is None:
        return {}
    width = max(2, len(str(len(record["per_layer"]))))
    layers = {f"mir_layer/{k:0{width}d}": value for k, value in enumerate(record["per_layer"], start=1)}
    best = best_record([*history, record])
    values = {"mir": record["mir"], **layers, "mir_seconds": record["seconds"]}
    if record.get("mir_se") is not None:
        values["mir_se"] = record["mir_se"]
    if record.get("mir_extrapolated") is not None:
        values["mir_extrapolated"] = record["mir_extrapolated"]
    if record.get("probe_loss") is not None:
        values |= {"mir_probe_loss": record["probe_loss"], "mir_probe_perplexity": math.exp(record["probe_loss"])}
    values |= summaries(record)
    values |= {f"mir_{name}": record[name] for name in GAINS if record.get(name) is not None}
    values |= {"mir_best": best["mir"], "mir_best_step": best["step"]}
    if record.get("peak_memory_bytes") is not None:
        values["mir_memory_gb"] = record["peak_memory_bytes"] / 1e9
    spent = record.get("train_seconds", 0.0) + record.get("eval_seconds", 0.0)
    return values | ({"mir_time_share": record["eval_seconds"] / spent} if spent > 0 else {})


def summaries(record: Record) -> dict[str, float]:
    """One number over all layers for each companion, where the record has them.

    `mir_mean_share` is the part of the summed distances that the means' gaps make, the others are means over layers.

    Ranks: pure.
    """
    companions = record.get("companions")
    if not companions:
        return {}
    found = {f"mir_{name}": fmean(companions[name]) for name in ("norm_ratio", "cosine", "vision_rank", "text_rank")}
    return {"mir_mean_share": math.fsum(companions["mean_part"]) / math.fsum(record["per_layer"])} | found


def best_record(history: Sequence[Record]) -> Record:
    """What :func:`lowest_record` finds, or before anything is trained the first with a value. One must have a value."""
    return lowest_record(history) or next(record for record in history if record["mir"] is not None)


def through_trainer(trainer: Any) -> Callable[[dict[str, float], Record], None]:
    """Log through `Trainer.log`, which reaches every reporter and `state.log_history`.

    Reporters read the step from the Trainer's state: while they do it has that of the record, which may be an earlier
    one. Logging clears `control.should_log`, which would swallow the loss of the same step: it is put back.

    Ranks: all, as `Trainer.log` is.
    """

    def log(values: dict[str, float], record: Record) -> None:
        due, state = trainer.control.should_log, trainer.state
        now = state.global_step, state.epoch
        try:
            state.global_step, state.epoch = record["step"], record.get("epoch", state.epoch)
            trainer.log(values)
        finally:
            trainer.control.should_log = due
            state.global_step, state.epoch = now

    return log
