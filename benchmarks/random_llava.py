# SPDX-License-Identifier: Apache-2.0
"""A LLaVA with random weights, and a probe of random tokens: what is in them does not matter for time and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mir_callback import Probe
from mir_callback.config import MIRConfig
from mir_callback.evaluation.evaluate import Evaluator
from mir_callback.model.modality import modality_masks
from mir_callback.probe.adapters import AdaptedBatch, LiveMasks
from mir_callback.probe.probe import Sample

VOCABULARY = 32064
IMAGE_ID = VOCABULARY - 1
PIXELS, PATCH = 336, 14
IMAGE_TOKENS = (PIXELS // PATCH) ** 2
TOWER = 1024


class RandomTokens:
    """Samples of random token ids and pixels."""

    def __init__(self, text_tokens: int) -> None:
        self._text_tokens = text_tokens

    def encode(self, samples: Sequence[Sample], max_text_tokens: int) -> AdaptedBatch:
        """See :class:`mir_callback.probe.adapters.Adapter`."""
        rows, pixels = [], []
        for sample in samples:
            rng = torch.Generator().manual_seed(int(sample.text))
            text = torch.randint(5, IMAGE_ID, (self._text_tokens,), generator=rng)
            rows.append(torch.cat([torch.tensor([1]), torch.full((IMAGE_TOKENS,), IMAGE_ID), text]))
            pixels.append(torch.randn(3, PIXELS, PIXELS, generator=rng))
        ids = torch.stack(rows)
        attention = torch.ones_like(ids)
        inputs = {"input_ids": ids, "attention_mask": attention, "pixel_values": torch.stack(pixels)}
        return AdaptedBatch(inputs, modality_masks(ids, attention, (IMAGE_ID,)), rows)

    def live_masks(self, model: nn.Module) -> AbstractContextManager[LiveMasks | None]:
        """See :class:`mir_callback.probe.adapters.Adapter`."""
        return nullcontext()


def build(
    hidden: int, layers: int, tower_layers: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> LlavaForConditionalGeneration:
    """A LLaVA with the proportions of LLaVA-1.5 and random weights."""
    tower = CLIPVisionConfig(
        hidden_size=TOWER,
        intermediate_size=4 * TOWER,
        num_hidden_layers=tower_layers,
        num_attention_heads=TOWER // 64,
        image_size=PIXELS,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        vocab_size=VOCABULARY,
    )
    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=IMAGE_ID, image_seq_length=IMAGE_TOKENS
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlavaForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def make_evaluator(model: nn.Module, samples: int, text_tokens: int, **options: Any) -> Evaluator:
    """For a probe of random samples; ``options`` as of `evaluate_mir`. Collective."""
    probe = Probe.from_pairs([(Image.new("RGB", (4, 4)), str(index)) for index in range(samples)])
    return Evaluator(model, probe, RandomTokens(text_tokens), MIRConfig(**options))


def bare_forward(model: nn.Module, evaluator: Evaluator) -> Callable[[], None]:
    """What puts this rank's batches through the model: no gradient, no cache, logits of one position."""
    parameter: Any = next(model.parameters())

    @torch.no_grad()
    def forward() -> None:
        for batch in evaluator.batches:
            model(**batch.on(parameter.device, parameter.dtype).inputs, use_cache=False, logits_to_keep=1)

    return forward
