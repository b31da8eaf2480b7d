# SPDX-License-Identifier: Apache-2.0
"""Vision and text positions of a batch, from its token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mir_callback.errors import UnsupportedModelError

_ID_FIELDS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")


@dataclass(frozen=True)
class ModalityMasks:
    """Vision and text positions of a batch, both (B, S) bool and disjoint."""

    vision: Tensor  # positions of image features
    text: Tensor  # positions after the sample's last image feature, without padding


def vision_token_ids(model: nn.Module) -> tuple[int, ...]:
    """Sorted ids of the image placeholders in ``input_ids``, from the model's configuration and its sub-configurations.

    Raises UnsupportedModelError for a model without any, such as a text-only one. Ranks: pure.
    """
    config: Any = getattr(model, "config", None)
    configs = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())]
    ids = {getattr(part, field, None) for part in configs for field in _ID_FIELDS}
    found = tuple(sorted(token for token in ids if isinstance(token, int) and token >= 0))
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no vision tokens: its config has none of {', '.join(_ID_FIELDS)}. MIR "
            "compares vision tokens with text tokens, so it needs a vision-language model whose image features are "
            "part of the language model's input sequence."
        )
    return found


def modality_masks(input_ids: Tensor, attention_mask: Tensor, vision_ids: tuple[int, ...]) -> ModalityMasks:
    """Split the positions of a batch by modality. Ranks: pure.

    Positions before a sample's last image feature that are not vision (BOS, system prompt, text between two images)
    are in neither mask. A sample without vision tokens has no text tokens either.

    Args:
        input_ids: (B, S) integers.
        attention_mask: (B, S), zero at padding.
        vision_ids: the ids of image placeholders.

    Source: arXiv:2410.07167 and the authors' code, which count the text after the image block.

    Example:
        >>> ids = torch.tensor([[1, 9, 9, 5, 6, 0]])  # BOS, two image features, two words, padding
        >>> modality_masks(ids, torch.tensor([[1, 1, 1, 1, 1, 0]]), vision_ids=(9,)).text
        tensor([[False, False, False,  True,  True, False]])
    """
    real = attention_mask != 0
    vision = torch.isin(input_ids, torch.tensor(vision_ids, device=input_ids.device)) & real
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    last_vision = torch.where(vision, position, -1).amax(dim=1, keepdim=True)
    text = real & ~vision & (position > last_vision) & (last_vision >= 0)
    return ModalityMasks(vision=vision, text=text)
