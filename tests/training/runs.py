# SPDX-License-Identifier: Apache-2.0
"""Small real training runs with the stock Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from tests import tiny_models
from tests.samples import pairs

MICRO_BATCH, ACCUMULATION = 2, 2


class Pairs(Dataset):
    """Image + text pairs for training, other ones than the probe's."""

    def __init__(self, count: int = 64) -> None:
        self._pairs = pairs(count, seed=9)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Any:
        return self._pairs[index]


def collator(processor: Any) -> Any:
    """Pairs to a training batch, as a user writes it."""

    def collate(items: list[Any]) -> Any:
        batch = processor(
            images=[[image] for image, _ in items],
            text=[processor.image_token + text for _, text in items],
            padding=True,
            return_tensors="pt",
        )
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch

    return collate


def make_trainer(
    output_dir: str | Path,
    *,
    steps: int = 6,
    dropout: float = 0.1,
    evaluated: int = 0,
    wrap: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Trainer:
    """A Trainer on a tiny LLaVA: gradient accumulation, dropout, every loss logged, nothing reported.

    With ``evaluated`` the Trainer's own evaluation has that many samples; ``wrap`` makes of the model what is trained.
    """
    model, processor = tiny_models.llava(dropout=dropout)
    args = TrainingArguments(
        output_dir=str(output_dir),
        **{
            "max_steps": steps,
            "per_device_train_batch_size": MICRO_BATCH,
            "gradient_accumulation_steps": ACCUMULATION,
            "learning_rate": 3e-3,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "save_strategy": "no",
            "remove_unused_columns": False,
            "disable_tqdm": True,
            "seed": 5,
            **options,
        },
    )
    return Trainer(
        model=wrap(model) if wrap else model,
        args=args,
        train_dataset=Pairs(),
        eval_dataset=Pairs(evaluated) if evaluated else None,
        data_collator=collator(processor),
        processing_class=processor,
    )


def losses(trainer: Trainer) -> list[tuple[int, float]]:
    """Step and loss of every loss logged."""
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """A copy of the model's weights."""
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def optimizer_state(optimizer: Any) -> dict[str, torch.Tensor]:
    """A copy of every tensor an optimizer keeps, the innermost one of those that wrap each other."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"{index}.{name}": value.detach().clone()
        for index, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }
