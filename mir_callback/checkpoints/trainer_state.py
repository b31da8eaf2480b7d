# SPDX-License-Identifier: Apache-2.0
"""What the Trainer knew when it saved a checkpoint, as far as it can be made sense of."""

from __future__ import annotations

import sys
from typing import Any

from mir_callback.checkpoints.folders import TRAINER_STATE, Checkpoint, read_json
from mir_callback.training.checkpoint import NOTE_NAME


def state_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the Trainer knew when it saved: fields of a record, finite numbers or None.

    Raises:
        ConfigError: its state is damaged.
    """
    state = read_json(checkpoint.folder / TRAINER_STATE) or read_json(checkpoint.folder / NOTE_NAME)
    loss, step = _newest_loss(state.get("log_history"), checkpoint.step)
    fields = {"epoch": _finite(state.get("epoch")), "loss": loss, "loss_step": step}
    return {**fields, "tokens_seen": _finite(state.get("num_input_tokens_seen")) or None}


def _newest_loss(log: Any, upto: int) -> tuple[float | None, int | None]:
    """The last finite loss in a Trainer's log and its step; a log may hold anything."""
    for entry in reversed(log) if isinstance(log, list) else ():
        loss = _finite(entry.get("loss")) if isinstance(entry, dict) else None
        if loss is None:
            continue
        step = entry.get("step") if type(entry.get("step")) is int else None
        if step is None or step <= upto:
            return loss, step
    return None, None


def _finite(value: Any) -> Any:
    """A number as it is; None for anything else, what is not finite and what no float holds."""
    known = type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max
    return value if known else None
