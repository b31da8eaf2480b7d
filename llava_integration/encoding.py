# SPDX-License-Identifier: Apache-2.0
"""What the adapters of LLaVA code bases share when they turn samples into inputs: plain texts, padded ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mir_callback.errors import ConfigError, ProbeError
from mir_callback.probe.huggingface import cut_text, require_plain_text
from mir_callback.probe.samples import Sample


def require_tokenizer(tokenizer: Any) -> None:
    """Raise ConfigError unless there is a tokenizer. Ranks: pure."""
    if tokenizer is None:
        raise ConfigError("tokenizer must be given, got None; pass the run's tokenizer, or give it to the Trainer")


def plain_text(sample: Sample, tokenizer: Any, max_text_tokens: int, placeholders: Iterable[str]) -> str:
    """A sample's text, cut.

    Args:
        sample: the sample.
        tokenizer: decides where ``max_text_tokens`` tokens end.
        max_text_tokens: longest text.
        placeholders: what the code base replaces in prompts by something else, such as ``<image>``.

    Raises:
        ProbeError: the text holds a placeholder or a control token of the tokenizer.

    Ranks: pure.
    """
    for token in placeholders:
        if token in sample.text:
            raise ProbeError(
                f"probe text of {sample.name} must be plain text, got {token!r} in it; remove or rewrite it"
            )
    text = cut_text(tokenizer, sample.text, max_text_tokens)
    require_plain_text(tokenizer, text, sample.name)
    return text


def pad_right(ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one batch.

    The fill is never read, as these models drop what the mask leaves out before they embed anything; so a tokenizer
    without a pad token will do. The mask follows the lengths, as texts can hold any id.

    Args:
        ids: (n,) integers each.

    Returns:
        Ids (B, S) and their attention mask (B, S) bool.

    Ranks: pure.
    """
    width = max(len(row) for row in ids)
    batch = torch.zeros(len(ids), width, dtype=torch.long)
    attention = torch.zeros(len(ids), width, dtype=torch.bool)
    for row, tokens in enumerate(ids):
        batch[row, : len(tokens)] = tokens
        attention[row, : len(tokens)] = True
    return batch, attention


def after_image(ids: Sequence[Tensor]) -> list[Tensor]:
    """Of each sample's token ids those after its last image, whose placeholder is negative. Ranks: pure."""
    return [row[int((row < 0).nonzero()[-1]) + 1 :] for row in ids]
