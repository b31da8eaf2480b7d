# SPDX-License-Identifier: Apache-2.0
"""Samples of several layouts, and an adapter for LLaVA that takes any of them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from mir_callback.model.modality import count_all_text, modality_masks
from mir_callback.probe.adapters import AdaptedBatch
from tests.samples import pairs


def mixed(count: int = 9) -> list[list[Any]]:
    """Pairs, two images among texts, and texts alone, in turn."""
    found = []
    for index, (image, text) in enumerate(pairs(count)):
        kinds = ([image, text], ["before " + text, image, "between", image.rotate(90), text], ["alone: " + text])
        found.append(kinds[index % 3])
    return found


class InOrder:
    """Puts images and texts one after the other; the frames of a video as images."""

    def __init__(self, model: Any, processor: Any, text_positions: str = "after_image") -> None:
        self.text_positions = text_positions
        self._image_id, self._processor = model.config.image_token_id, processor

    def encode(self, samples: Any, max_text_tokens: int) -> AdaptedBatch:
        """See :class:`mir_callback.probe.adapters.Adapter`."""
        prompts = [
            "".join(
                part if isinstance(part, str) else "<image>" * (len(part) if isinstance(part, list) else 1)
                for part in sample.open_parts()
            )
            for sample in samples
        ]
        images = [image for sample in samples for image in sample.open_images()]
        inputs = self._processor(text=prompts, images=images or None, padding=True, return_tensors="pt")
        ids, real = inputs["input_ids"], inputs["attention_mask"]
        masks = modality_masks(ids, real, (self._image_id,))
        whole = torch.tensor([self.text_positions == "all" or not sample.has_vision for sample in samples])
        masks = count_all_text(masks, ids, real, self._processor.tokenizer.all_special_ids, whole)
        rows = [row[keep != 0] for row, keep in zip(ids, real, strict=True)]
        return AdaptedBatch(dict(inputs), masks, rows, [row[at] for row, at in zip(ids, masks.text, strict=True)])

    def live_masks(self, model: Any) -> Any:
        """See :class:`mir_callback.probe.adapters.Adapter`."""
        return nullcontext()
