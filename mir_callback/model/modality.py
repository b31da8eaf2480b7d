# SPDX-License-Identifier: Apache-2.0
"""Vision and text positions of a batch, from its token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from mir_callback.errors import ConfigError, UnsupportedModelError
from mir_callback.model.decoder import find_decoder

_CROSS = ("cross_attn", "crossattn", "cross_attention", "crossattention")
_VISION = ("vision", "visual", "qformer", "perceiver", "resampler")
_MOST_IDS = 1_000_000
_NEED = "MIR compares vision tokens with text tokens of one sequence, the decoder's."
_ID_FIELDS = ("image_token_id", "video_token_id", "image_token_index", "video_token_index")
# Which positions count as text, and whether samples without an image do: options of MIRConfig, the default first.
AFTER_IMAGE, EVERY = TEXT_POSITIONS = ("after_image", "all")
LEAVE_OUT, COUNT = TEXT_ONLY = ("leave_out", "count")


@dataclass(frozen=True)
class ModalityMasks:
    """Vision and text positions of a batch, both (B, S) bool and disjoint."""

    vision: Tensor  # positions of image features
    text: Tensor  # positions after the sample's last image feature, or all that are text; without padding


def vision_token_ids(model: nn.Module, written: str | None = None) -> tuple[int, ...]:
    """Sorted ids of the image placeholders in ``input_ids``, from the model's configuration and its sub-configurations.

    Those ``written`` down, as for :func:`parse_ids`, are taken instead if there are any. Empty for a model with a
    vision tower whose configuration names none, as kosmos-2's.

    Raises:
        UnsupportedModelError: images are no tokens of the decoder's sequence: a text-only model, an encoder-decoder,
            cross-attention.

    Ranks: pure.
    """
    kind, config = type(model).__name__, getattr(model, "config", None)
    configs = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", None) or ())]
    # Not of all: an encoder of sound may have a decoder that nobody uses.
    if any(getattr(part, "is_encoder_decoder", False) for part in (config, getattr(config, "text_config", None))):
        raise UnsupportedModelError(
            f"{kind} is an encoder-decoder: images are in the encoder's sequence, text in the decoder's. {_NEED}"
        )
    ids = {getattr(part, field, None) for part in configs for field in _ID_FIELDS}
    found = parse_ids(written) or tuple(sorted(token for token in ids if isinstance(token, int) and token >= 0))
    if not found and getattr(config, "vision_config", None) is None:
        raise UnsupportedModelError(
            f"{kind} has no vision tokens: its config has no vision_config and none of {', '.join(_ID_FIELDS)} "
            f"(if images are tokens of its vocabulary, name them: vision_ids='4-8195'). {_NEED}"
        )
    crossing = _find_cross_attention(model)
    if crossing is not None:
        raise UnsupportedModelError(f"{kind} mixes images in by cross-attention ({crossing}). {_NEED}")
    return found


def parse_ids(written: str | None) -> tuple[int, ...]:
    """Token ids written as numbers and ranges; ConfigError if they are not. Ranks: pure.

    Example:
        >>> parse_ids("4-6,9")
        (4, 5, 6, 9)
    """
    found: set[int] = set()
    if not isinstance(written, str | None):
        raise ConfigError(f"vision_ids={written!r:.60} is no string. Write ids and ranges of them: '4-8195,8200'.")
    for part in (written or "").split(",") if written is not None else ():
        first, is_range, last = part.strip().partition("-")
        last = last if is_range else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise ConfigError(f"vision_ids={written!r}: {part!r} is neither an id nor a range. Write 4-8195,8200.")
        if int(last) >= _MOST_IDS:
            raise ConfigError(f"vision_ids={written!r:.60} goes beyond {_MOST_IDS}, and no vocabulary does.")
        found |= set(range(int(first), int(last) + 1))
    if written is not None and not found:
        raise ConfigError(f"vision_ids={written!r} names no ids. Write them as 4-8195,8200, or leave the option out.")
    return tuple(sorted(found))


def write_ids(ids: Sequence[int]) -> str:
    """Token ids as :func:`parse_ids` reads them, ranges short. Ranks: pure.

    Example:
        >>> write_ids((4, 5, 6, 9))
        '4-6,9'
    """
    runs = groupby(enumerate(sorted(ids)), key=lambda each: each[1] - each[0])
    ends = [(found[0][1], found[-1][1]) for found in (list(run) for _, run in runs)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)


def _find_cross_attention(model: nn.Module) -> str | None:
    """The name of a module of the decoder that attends to another sequence; None without."""
    owner = find_decoder(model).path.rpartition(".")[0]
    name: str
    for name, _ in model.get_submodule(owner).named_modules(prefix=owner):
        words = name.lower()
        if any(word in words for word in _CROSS) and not any(word in words for word in _VISION):
            return name
    return None


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


def count_all_text(
    masks: ModalityMasks, input_ids: Tensor, attention_mask: Tensor, special_ids: Iterable[int], samples: Tensor
) -> ModalityMasks:
    """Masks in which all positions of some samples that are no image features count as text. Ranks: pure.

    The special tokens that such a sample begins with, such as BOS, are in neither mask.

    Args:
        masks: of the batch, as by :func:`modality_masks`.
        input_ids: (B, S) integers.
        attention_mask: (B, S), zero at padding.
        special_ids: ids of the tokenizer's special tokens.
        samples: (B,) bool: all with ``text_positions="all"``, else those without an image.

    Example:
        >>> ids, real = torch.tensor([[1, 5, 9, 9, 6, 0]]), torch.tensor([[1, 1, 1, 1, 1, 0]])  # BOS, word, image, word
        >>> masks = modality_masks(ids, real, vision_ids=(9,))
        >>> count_all_text(masks, ids, real, {0, 1}, torch.tensor([True])).text
        tensor([[False,  True, False, False,  True, False]])
    """
    real = attention_mask != 0
    special = torch.isin(input_ids, torch.tensor([*special_ids], dtype=input_ids.dtype, device=input_ids.device))
    begun = (real & ~special).cumsum(dim=1) > 0
    text = torch.where(samples.to(real.device)[:, None], real & ~masks.vision & begun, masks.text)
    return ModalityMasks(vision=masks.vision, text=text)
