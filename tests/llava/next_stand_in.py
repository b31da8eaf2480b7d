# SPDX-License-Identifier: Apache-2.0
"""A small stand-in for LLaVA-NeXT, which no package index has, with what an adapter can get wrong about it.

It stands for LLaVA-VL/LLaVA-NeXT at commit df179663ae8b83207df100a1f7af24caec633ff9 in this: the arguments of the image
expansion and their order; images in a list treated otherwise than a stacked batch (only they get the newline feature);
grids cropped by the image's size; rows beyond the modalities given dropped; padding dropped by the attention mask; a
processing function that stacks images of one shape; templates that lose their tokenizer when copied. The arithmetic of
images is its own. The real repository is compared by `tests.llava.next_worker`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

IMAGE, IGNORE = -200, -100
SIDE, PATCHES = 32, 4  # pixels and patches along one side of a tile


class SeparatorStyle(Enum):
    """Those of the templates here."""

    PLAIN = 1
    CHATML = 2
    LLAMA_3 = 3


@dataclass
class Conversation:
    """Roles and messages to a prompt."""

    sep_style: SeparatorStyle
    system: str = ""
    roles: tuple[str, str] = ("", "")
    sep: str = "\n"
    messages: list[list[str]] = field(default_factory=list)
    tokenizer: Any = None

    def copy(self) -> Conversation:
        """Without the tokenizer."""
        return replace(self, messages=[list(message) for message in self.messages], tokenizer=None)

    def append_message(self, role: str, text: str) -> None:
        self.messages.append([role, text])

    def get_prompt(self) -> str:
        if self.sep_style is SeparatorStyle.LLAMA_3 and self.tokenizer is None:
            raise ValueError("no tokenizer")
        turns = [(self.system, None), *self.messages] if self.system else self.messages
        return "".join(f"{role}\n{text}{self.sep}\n" if text else f"{role}{self.sep}\n" for role, text in turns)


TEMPLATES = {
    "plain": Conversation(SeparatorStyle.PLAIN),
    "qwen_1_5": Conversation(SeparatorStyle.CHATML, "system\nYou help.", ("user", "assistant"), "."),
    "llava_llama_3": Conversation(SeparatorStyle.LLAMA_3, "", ("user", "assistant"), ".", [], "its own"),
}


def tokenizer_image_token(prompt: str, tokenizer: Any, return_tensors: str) -> Tensor:
    """Token ids with one placeholder per image."""
    before, after = (tokenizer(part).input_ids for part in prompt.split("<image>"))
    return torch.tensor([*before, IMAGE, *after])


def tile(picture: Any, box: tuple[int, int]) -> Tensor:
    """A picture at a size, as (3, H, W)."""
    return torch.from_numpy(np.array(picture.resize(box))).permute(2, 0, 1) / 255


def process_images(pictures: list[Any], image_processor: Any, config: Any) -> Any:
    """Square: stacked. Anyres: the whole picture and two halves, side by side or one below the other."""
    if config.image_aspect_ratio == "square":
        return torch.stack([tile(picture, (SIDE, SIDE)) for picture in pictures])
    tiles = []
    for picture in pictures:
        wide = picture.width >= picture.height
        halves = tile(picture, (2 * SIDE, SIDE) if wide else (SIDE, 2 * SIDE)).chunk(2, dim=2 if wide else 1)
        tiles.append(torch.stack([tile(picture, (SIDE, SIDE)), *halves]))
    return torch.stack(tiles)


class VisionTower(nn.Module):
    """Patches to features of the language model's width."""

    image_processor = None

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, SIDE // PATCHES, SIDE // PATCHES)

    def forward(self, images: Tensor) -> Tensor:
        return self.patches(images).flatten(2).transpose(1, 2)  # (N, 16, d)


class LlavaStandIn(LlamaForCausalLM):
    """The part of LlavaLlamaForCausalLM that is under test."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.tower = VisionTower(config.hidden_size)
        self.newline = nn.Parameter(torch.randn(config.hidden_size))

    def get_vision_tower(self) -> VisionTower:
        return self.tower

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        labels: Any = None,
        images: Any = None,
        image_sizes: Any = None,
        modalities: Any = ("image",),
        **options: Any,
    ) -> Any:
        _, position_ids, attention_mask, _, embeds, labels = self.prepare_inputs_labels_for_multimodal(
            input_ids, position_ids, attention_mask, None, labels, images, modalities, image_sizes
        )
        return super().forward(inputs_embeds=embeds, attention_mask=attention_mask, labels=labels, **options)

    def prepare_inputs_labels_for_multimodal(
        self,
        input_ids: Tensor,
        position_ids: Any,
        attention_mask: Any,
        past_key_values: Any,
        labels: Any,
        images: Any,
        modalities: Any = ("image",),
        image_sizes: Any = None,
    ) -> tuple[Any, ...]:
        if isinstance(images, list):
            features = [self._features(image, index, image_sizes) for index, image in enumerate(images)]
        else:
            features = list(self.tower(images))
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        marks = torch.full_like(input_ids, IGNORE) if labels is None else labels
        rows = []
        for ids, keep, mark, feature, _ in zip(input_ids, real.bool(), marks, features, modalities, strict=False):
            at = int((ids[keep] == IMAGE).nonzero())
            embeds = self.get_input_embeddings()(ids[keep].clamp(min=0))
            ignored = torch.full((len(feature),), IGNORE)
            rows.append(
                (
                    torch.cat([embeds[:at], feature, embeds[at + 1 :]]),
                    torch.cat([mark[keep][:at], ignored, mark[keep][at + 1 :]]),
                    torch.ones(len(embeds) - 1 + len(feature)),
                )
            )
        pad = nn.utils.rnn.pad_sequence
        embeds, marks, real = (
            pad(list(column), batch_first=True, padding_value=value)
            for column, value in zip(zip(*rows, strict=True), (0.0, IGNORE, 0), strict=True)
        )
        return (
            None,
            position_ids,
            None if attention_mask is None else real.to(attention_mask.dtype),
            past_key_values,
            embeds,
            None if labels is None else marks,
        )

    def _features(self, image: Tensor, index: int, sizes: Any) -> Tensor:
        tiles = self.tower(image[None] if image.ndim == 3 else image)
        if self.config.mm_patch_merge_type == "flat":
            return tiles.flatten(0, 1)
        if len(tiles) == 1:
            return torch.cat([tiles[0], self.newline[None]])
        width, height = sizes[index]
        grid = tiles[1:].unflatten(1, (PATCHES, PATCHES))
        grid = torch.cat(list(grid), dim=1 if width >= height else 0)
        short = max(1, PATCHES * min(width, height) // max(width, height))
        grid = grid[:short] if width >= height else grid[:, :short]
        lines = self.newline.expand(len(grid), 1, -1)
        return torch.cat([tiles[0], torch.cat([grid, lines], dim=1).flatten(0, 1)])


def modules() -> dict[str, ModuleType]:
    """The package `llava` as entries of sys.modules."""
    tokens = {
        "DEFAULT_IMAGE_TOKEN": "<image>",
        "DEFAULT_IMAGE_PATCH_TOKEN": "<im_patch>",
        "DEFAULT_IM_START_TOKEN": "<im_start>",
    }
    contents: dict[str, dict[str, Any]] = {
        "llava.constants": {"IMAGE_TOKEN_INDEX": IMAGE, "DEFAULT_IM_END_TOKEN": "<im_end>", **tokens},
        "llava.conversation": {
            "SeparatorStyle": SeparatorStyle,
            "conv_templates": TEMPLATES,
            "default_conversation": TEMPLATES["plain"],
        },
        "llava.mm_utils": {"tokenizer_image_token": tokenizer_image_token, "process_images": process_images},
    }
    made = {name: ModuleType(name) for name in ("llava", *contents)}
    for name, entries in contents.items():
        vars(made[name]).update(entries)
        setattr(made["llava"], name.split(".")[1], made[name])
    return made
