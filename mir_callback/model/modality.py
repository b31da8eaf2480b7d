# SPDX-License-Identifier: Apache-2.0
"""Vision and text positions of a batch, from its token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mir_callback.errors import UnsupportedModelError
from mir_callback.model.decoder import find_decoder

_CROSS = ("cross_attn", "crossattn", "cross_attention", "crossattention")
_VISION = ("vision", "visual", "qformer", "perceiver", "resampler")
_ID_FIELDS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")


@dataclass(frozen=True)
class ModalityMasks:
    """Vision and text positions of a batch, both (B, S) bool and disjoint."""

    vision: Tensor  # positions of image features
    text: Tensor  # positions after the sample's last image feature, without padding


def vision_token_ids(model: nn.Module) -> tuple[int, ...]:
    """Sorted ids of the image placeholders in ``input_ids``, from the model's configuration and its sub-configurations.

    Empty for a model with a vision tower whose configuration names none, as kosmos-2's. Raises UnsupportedModelError
    for a model without either. Ranks: pure.
    """
    config: Any = getattr(model, "config", None)
    configs = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())]
    ids = {getattr(part, field, None) for part in configs for field in _ID_FIELDS}
    found = tuple(sorted(token for token in ids if isinstance(token, int) and token >= 0))
    if not found and getattr(config, "vision_config", None) is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no vision tokens: its config has none of {', '.join(_ID_FIELDS)}. MIR "
            "compares vision tokens with text tokens, so it needs a vision-language model whose image features are "
            "part of the language model's input sequence."
        )
    return found


def require_one_sequence(model: nn.Module) -> None:
    """Refuse a model of transformers whose images never become positions of its decoder's sequence.

    Raises UnsupportedModelError for encoder-decoders and cross-attention. Ranks: pure.
    """
    config: Any = getattr(model, "config", None)
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())]
    kind = type(model).__name__
    if any(getattr(part, "is_encoder_decoder", False) for part in parts):
        raise UnsupportedModelError(
            f"{kind} is an encoder-decoder: its images are in the encoder's sequence, its text in the decoder's. MIR "
            "compares vision and text tokens of one sequence, so it needs a decoder-only language model."
        )
    decoder = find_decoder(model)
    owner = model.get_submodule(decoder.path.rpartition(".")[0])
    for name, _ in owner.named_modules():
        if any(word in name.lower() for word in _CROSS) and not any(word in name.lower() for word in _VISION):
            raise UnsupportedModelError(
                f"{kind} mixes images in by cross-attention ({decoder.path.rpartition('.')[0]}.{name}), so they are no "
                "tokens of its sequence. MIR compares vision and text tokens of one sequence."
            )


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
    return masks_of(torch.isin(input_ids, torch.tensor(vision_ids, device=input_ids.device)), attention_mask)


def masks_of(vision: Tensor, attention_mask: Tensor) -> ModalityMasks:
    """As :func:`modality_masks`, from the positions of image features, (B, S) bool. Ranks: pure."""
    real = attention_mask != 0
    vision = vision & real
    position = torch.arange(vision.shape[1], device=vision.device)
    last_vision = torch.where(vision, position, -1).amax(dim=1, keepdim=True)
    text = real & ~vision & (position > last_vision) & (last_vision >= 0)
    return ModalityMasks(vision=vision, text=text)
