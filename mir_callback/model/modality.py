# SPDX-License-Identifier: Apache-2.0
"""Which positions of a batch are vision and which are text, from token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mir_callback.errors import UnsupportedModelError

_ID_FIELDS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")


@dataclass(frozen=True)
class ModalityMasks:
    """Positions of a batch, both (B, S) bool and disjoint."""

    vision: Tensor  # positions that hold an image feature
    text: Tensor  # real (non-padding) positions after the sample's last image feature


def vision_token_ids(model: nn.Module) -> tuple[int, ...]:
    """Sorted ids that stand for image features in ``input_ids``, from the configuration and its sub-configurations.

    Raises UnsupportedModelError if they name none. Ranks: pure.
    """
    config: Any = getattr(model, "config", None)
    configs = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())]
    ids = {getattr(part, field, None) for part in configs for field in _ID_FIELDS}
    found = tuple(sorted(token for token in ids if isinstance(token, int) and token >= 0))
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__}: model.config names no image token ({', '.join(_ID_FIELDS)}); "
            "MIR needs a model whose image features stand in the language model's token stream"
        )
    return found


def modality_masks(input_ids: Tensor, attention_mask: Tensor, vision_ids: tuple[int, ...]) -> ModalityMasks:
    """Split the positions (B, S) of a batch by modality; the attention mask is non-zero at real tokens. Ranks: pure.

    What stands before a sample's last image feature and is not vision (BOS, system prompt, text between two images)
    is in neither mask, and a sample without vision has no text either.
    Source: arXiv:2410.07167 and the authors' code, which count the text after the image block.
    """
    real = attention_mask != 0
    vision = torch.isin(input_ids, torch.tensor(vision_ids, device=input_ids.device)) & real
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    last_vision = torch.where(vision, position, -1).amax(dim=1, keepdim=True)
    text = real & ~vision & (position > last_vision) & (last_vision >= 0)
    return ModalityMasks(vision=vision, text=text)
