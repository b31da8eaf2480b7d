# SPDX-License-Identifier: Apache-2.0
"""How many tokens the samples of a probe become, without a forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mir_callback.probe.adapter import Adapter
from mir_callback.probe.batches import encode_probe
from mir_callback.probe.huggingface import cut_text
from mir_callback.probe.samples import Probe


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of every sample.

    Attributes:
        vision: per sample, or None where only a forward shows them or no model was named.
        text: per sample, those after the image; of a tokenizer alone those of the text itself.
        fingerprint: the tokens fingerprint that evaluations with this model and processor carry, or None.
    """

    vision: list[int] | None
    text: list[int]
    fingerprint: str | None


def counts_of_model(probe: Probe, adapter: Adapter) -> TokenCounts:
    """Tokens as an evaluation with this adapter has them.

    Args:
        probe: the samples.
        adapter: one that knows its masks before the forward, as that of Hugging Face models does.

    Raises:
        ProbeError: a sample does not fit the model; the message names it.

    Ranks: any, each for itself.
    """
    encoded = encode_probe(probe, adapter, rank=0, world_size=1, batch_size=1)
    masks = [batch.masks for batch in encoded.batches]
    vision = [int(mask.vision.sum()) for mask in masks if mask is not None]
    text = [int(mask.text.sum()) for mask in masks if mask is not None]
    return TokenCounts(vision, text, encoded.tokens_fingerprint)


def counts_of_tokenizer(probe: Probe, tokenizer: Any) -> TokenCounts:
    """Tokens of the texts alone, after the probe's cut. Ranks: any, each for itself."""
    texts = (cut_text(tokenizer, sample.text, probe.max_text_tokens) for sample in probe.samples)
    return TokenCounts(None, [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts], None)
