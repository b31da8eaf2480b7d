# SPDX-License-Identifier: Apache-2.0
"""How the samples of a probe become inputs of nanoVLM. Copy this file beside its `train.py`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from data.collators import BaseCollator
from data.datasets import VQADataset
from data.processors import get_image_processor, get_tokenizer
from torch import nn

from mir_callback.model.decoder import Decoder, decoder_at
from mir_callback.model.modality import modality_masks
from mir_callback.probe.adapters import AdaptedBatch, LiveMasks, cut_text, require_plain_text
from mir_callback.probe.probe import Sample


class NanoVLMAdapter:
    """Encodes samples as nanoVLM's own data set does: the image as the user's turn, the text as the assistant's.

    Args:
        config: a VLMConfig.
    """

    def __init__(self, config: Any) -> None:
        self._tokenizer = get_tokenizer(config.lm_tokenizer, config.vlm_extra_tokens, config.lm_chat_template)
        images = get_image_processor(config.max_img_size, config.vit_img_size, config.resize_to_max_side_len)
        self._encoding = (self._tokenizer, images, config.mp_image_token_length)

    def encode(self, samples: Sequence[Sample], max_text_tokens: int) -> AdaptedBatch:
        """See Adapter."""
        rows, image_id = [], self._tokenizer.image_token_id
        for sample in samples:
            text = cut_text(self._tokenizer, sample.text, max_text_tokens)
            require_plain_text(self._tokenizer, text, sample.name)
            rows.append({"images": [sample.open_image()], "texts": [{"user": "", "assistant": text}]})
        dataset = VQADataset(rows, *self._encoding)
        inputs = BaseCollator(self._tokenizer).prepare_batch([dataset[index] for index in range(len(rows))])
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        real = [row[keep != 0] for row, keep in zip(ids, mask, strict=True)]
        del inputs["labels"]
        return AdaptedBatch(inputs, modality_masks(ids, mask, (image_id,)), real)

    def live_masks(self, model: nn.Module) -> AbstractContextManager[LiveMasks | None]:
        """See Adapter."""
        return nullcontext()

    def decoder(self, model: Any) -> Decoder:
        """See NamesDecoder."""
        width = model.cfg.lm_hidden_dim
        return decoder_at(model, "decoder.blocks", embedding="decoder.token_embedding", hidden_size=width)
