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


def require_pad_token(tokenizer: Any) -> None:
    """Raise ConfigError unless there is a tokenizer with a pad token. Ranks: pure."""
    if tokenizer is None or getattr(tokenizer, "pad_token_id", None) is None:
        raise ConfigError(
            f"tokenizer must have a pad token, got {type(tokenizer).__name__} without one; "
            "LLaVA sets tokenizer.pad_token = tokenizer.unk_token"
        )


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


def pad_right(ids: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one batch.

    The mask follows the lengths and not the ids: LLaVA's pad token is one that texts can hold too.

    Args:
        ids: (n,) integers each.
        pad_id: what fills up shorter rows.

    Returns:
        Ids (B, S) and their attention mask (B, S) bool.

    Ranks: pure.
    """
    width = max(len(row) for row in ids)
    batch = torch.full((len(ids), width), pad_id, dtype=torch.long)
    attention = torch.zeros(len(ids), width, dtype=torch.bool)
    for row, tokens in enumerate(ids):
        batch[row, : len(tokens)] = tokens
        attention[row, : len(tokens)] = True
    return batch, attention
