# SPDX-License-Identifier: Apache-2.0
"""What a family of models must tell: how samples become its inputs, and where its image features end up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from mir_callback.model.modality import ModalityMasks
from mir_callback.probe.samples import Sample

# Called at the first decoder layer of a forward: the masks of the sequence that the layers see in it.
LiveMasks = Callable[[], ModalityMasks]


@dataclass(frozen=True)
class AdaptedBatch:
    """Samples as inputs of a model, on the CPU.

    Attributes:
        inputs: keyword arguments of the model's forward, without labels.
        masks: modality masks (B, S), or None if only the forward itself shows where image features end up.
        token_ids: the real token ids of each sample, (n,) integers; what makes encodings comparable.
        text_ids: those of them after the last image, for the loss on the probe's texts; None if that is not offered.
    """

    inputs: dict[str, Any]
    masks: ModalityMasks | None
    token_ids: list[Tensor]
    text_ids: list[Tensor] | None = None


@runtime_checkable
class Adapter(Protocol):
    """Between a probe and one family of models. Stateless between calls; the same on every rank."""

    def encode(self, samples: Sequence[Sample], max_text_tokens: int) -> AdaptedBatch:
        """Turn samples into one batch, image first, text after, cut to ``max_text_tokens``.

        Raises:
            ProbeError: a sample does not fit the model; the message names it.
        """
        ...

    def live_masks(self, model: nn.Module) -> AbstractContextManager[LiveMasks | None]:
        """While open, observe where the model puts image features; None if `encode` knows already.

        Must leave the model as it was.
        """
        ...
