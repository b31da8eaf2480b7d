# SPDX-License-Identifier: Apache-2.0
"""How far a run has come, as its records say it, so that runs can be compared at equal cost."""

from __future__ import annotations

import math

from transformers import TrainerState, TrainingArguments

from mir_callback.training.history import Record


def progress_fields(args: TrainingArguments, state: TrainerState) -> Record:
    """What a record says of the run besides its step.

    Returns:
        `loss`: the training loss the Trainer logged last, None before the first one or if it was not finite.
        `loss_step`: the step it was logged at, as a rule before this record's: the Trainer logs after its callbacks.
        `tokens_seen`: input tokens so far on all ranks, None unless the Trainer counts them
        (`include_num_input_tokens_seen`).
        `samples_seen`: steps times the batch over all ranks, accumulation included; a batch that an epoch's end cuts
        short counts as a whole one.

    Ranks: each for itself, with the same result.
    """
    counted = getattr(args, "include_num_input_tokens_seen", False) not in (False, "no")
    on_each = getattr(state, "train_batch_size", None) or args.train_batch_size  # lowered by auto_find_batch_size
    batch = on_each * args.gradient_accumulation_steps * args.world_size
    newest = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
    known = "loss" in newest and math.isfinite(newest["loss"])
    return {
        "loss": newest["loss"] if known else None,
        "loss_step": newest.get("step") if known else None,
        "tokens_seen": int(state.num_input_tokens_seen) if counted else None,
        "samples_seen": state.global_step * batch,
    }
