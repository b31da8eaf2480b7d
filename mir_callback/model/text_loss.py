# SPDX-License-Identifier: Apache-2.0
"""How well a model predicts the probe's texts, from the same forwards that show its hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mir_callback.errors import UnsupportedModelError

_CHUNK_TOKENS = 512  # whose logits are held in float32 at a time


class TextLoss:
    """Sums the negative log-likelihood of text tokens given the image and the text before them.

    Predicted are all text tokens of a sample but its first, from the positions before each; only at those are logits
    computed.

    Attributes:
        total: in nats, of the samples kept so far.
        count: tokens predicted.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0
        self._before = torch.zeros(0, dtype=torch.int64)
        self._targets = torch.zeros(0, dtype=torch.int64)
        self._shape: tuple[int, ...] = ()

    def expect(self, text: Tensor, text_ids: Sequence[Tensor]) -> None:
        """Note what the next logits predict.

        Args:
            text: (B, S) bool, text positions of the samples that are kept.
            text_ids: token ids of each sample's text, (n,) integers; longer than its positions where those were cut.

        Raises:
            UnsupportedModelError: more text positions than ids.
        """
        before, targets = [], []
        self._shape = tuple(text.shape)
        for row, (mask, ids) in enumerate(zip(text, text_ids, strict=True)):
            positions = mask.nonzero()[:, 0]
            if len(positions) > len(ids):
                raise UnsupportedModelError(
                    f"probe_loss needs a token id for each text position, got {len(ids)} for {len(positions)}; "
                    "switch probe_loss off for this model"
                )
            before.append(row * text.shape[1] + positions[:-1])
            targets.append(ids.to(text.device)[1 : len(positions)])
        self._before, self._targets = torch.cat(before), torch.cat(targets)

    def select(self, _head: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Pre-hook of the output embeddings: of hidden states (B, S, d) keep those to predict from, (1, n, d)."""
        hidden = args[0]
        if tuple(hidden.shape[:-1]) != self._shape:
            raise UnsupportedModelError(
                f"probe_loss needs hidden states of all positions {self._shape} at the output embeddings, got "
                f"{tuple(hidden.shape[:-1])}; switch probe_loss off for this model"
            )
        return (hidden.flatten(0, 1).index_select(0, self._before)[None], *args[1:])

    def add(self, outputs: Any) -> None:
        """Add what a model's outputs say, whose logits are (1, n, vocabulary)."""
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if tuple(logits.shape[:-1]) != (1, len(self._targets)):
            raise UnsupportedModelError(
                f"probe_loss needs logits of {len(self._targets)} positions, got {tuple(logits.shape[:-1])}; switch "
                "probe_loss off for this model"
            )
        for start in range(0, len(self._targets), _CHUNK_TOKENS):
            part = slice(start, start + _CHUNK_TOKENS)
            loss = functional.cross_entropy(logits[0, part].float(), self._targets[part], reduction="none")
            self.total += loss.double().sum().item()
        self.count += len(self._targets)
