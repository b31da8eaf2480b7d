# SPDX-License-Identifier: Apache-2.0
"""Scenes and captions as LLaVA's stage-1 ("plain") batches: image, caption, end of text; loss on the caption only."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import LlavaProcessor

IGNORED = -100


class CaptionCollator:
    """Turns samples with an ``image`` and a ``caption`` into model inputs with labels."""

    def __init__(self, processor: LlavaProcessor) -> None:
        self.processor = processor

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Batch ``samples``; labels are ignored up to the last image token and on padding."""
        tokenizer = self.processor.tokenizer
        batch = self.processor(
            images=[sample["image"] for sample in samples],
            text=[f"{self.processor.image_token}{sample['caption']}{tokenizer.eos_token}" for sample in samples],
            padding=True,
            return_tensors="pt",
        )
        ids = batch["input_ids"]
        unlearnt = (ids == self.processor.image_token_id) | (ids == tokenizer.bos_token_id)
        batch["labels"] = ids.masked_fill(unlearnt | (batch["attention_mask"] == 0), IGNORED)
        return dict(batch)
