# SPDX-License-Identifier: Apache-2.0
"""How many samples and epochs a Trainer's steps are."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from mir_callback import distributed
from mir_callback.errors import MIRError
from mir_callback.history import FILE_NAME, read_history
from mir_callback.record import EvalRecord


def samples_a_step(args: TrainingArguments, state: TrainerState, trainer: Any) -> int:
    """Samples of an optimizer step over all ranks, accumulation included.

    A short batch at an epoch's end counts in full; ranks that share samples (tensor, context, sequence parallelism)
    count once.
    """
    on_each = getattr(trainer, "_train_batch_size", None) or getattr(state, "train_batch_size", None)
    ranks = args.world_size // math.prod(_size_of(trainer, kind) for kind in ("tp", "cp", "sp"))
    samples: int = (on_each or args.train_batch_size) * args.gradient_accumulation_steps * ranks
    return samples


def samples_before(folder: str, step: int, samples_a_step: int) -> int:
    """Samples up to the step that a run is resumed at; before it, batch and ranks may have been others.

    Ranks: collective; rank 0 reads the history.
    """
    records: list[EvalRecord] = []
    if step and distributed.is_main():
        with suppress(MIRError, OSError):  # opening it says what is wrong
            records = read_history(Path(folder) / FILE_NAME)
    known = [(each.step, each.samples_seen) for each in records if each.samples_seen is not None and each.step <= step]
    found = step * samples_a_step
    if len(known) > 1:
        (earlier, then), (last, seen) = known[-2:]
        found = seen + round((seen - then) / (last - earlier) * (step - last))
    return int(distributed.broadcast_object(found))


def _size_of(trainer: Any, kind: str) -> int:
    """A Trainer's size of "tp", "cp" or "sp"; 1 where it knows none."""
    return int(getattr(trainer, f"get_{kind}_size", lambda: 1)())


def epochs_of(max_steps: int, dataloader: Any, args: TrainingArguments) -> float:
    """How many epochs ``max_steps`` are; the Trainer takes a loader without a length for one epoch."""
    try:
        return max_steps / math.ceil(len(dataloader) / args.gradient_accumulation_steps)
    except (TypeError, ZeroDivisionError):
        return 1.0
