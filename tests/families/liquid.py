# SPDX-License-Identifier: Apache-2.0
"""Liquid AI's hybrids of convolutions and attention."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Lfm2VlImageProcessor,
    Lfm2VlProcessor,
    Lfm3VlConfig,
    Lfm3VlForConditionalGeneration,
    Lfm3VlProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3VLVideoProcessor,
)

from tests.families.registry import Family
from tests.tiny_models import sizes, tokenizer

PIXELS = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}


def lfm2_vl() -> tuple[Any, Any]:
    """LFM2-VL: tiles with markers of row and column, which the processor adds."""
    torch.manual_seed(0)
    tiles = [f"<|img_row_{row}_col_{col}|>" for row in (1, 2, 3, 4) for col in (1, 2, 3, 4)]
    special = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
    }
    tok = tokenizer(special, tiles)
    text = {"model_type": "lfm2", **sizes(tok), "layer_types": ["conv", "full_attention", "conv"]}
    vision = {
        "model_type": "siglip2_vision_model",
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 8,
        "num_patches": 16,
    }
    config = Lfm2VlConfig(
        text_config=text, vision_config=vision, image_token_id=tok.image_token_id, projector_hidden_size=48
    )
    images = Lfm2VlImageProcessor(
        encoder_patch_size=8,
        tile_size=32,
        size={"height": 32, "width": 32},
        min_image_tokens=2,
        max_image_tokens=4,
        max_tiles=4,
    )
    return Lfm2VlForConditionalGeneration(config), Lfm2VlProcessor(images, tok)


def lfm3_vl() -> tuple[Any, Any]:
    """LFM3-VL: convolutions, sliding and full attention; its processor does not add the image's start and end."""
    torch.manual_seed(0)
    names = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    tok = tokenizer(names, [])
    kinds = ["conv", "sliding_attention", "full_attention"]
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "patch_size": 8,
        "layer_types": ["conv", "conv", "full_attention"],
    }
    config = Lfm3VlConfig(
        text_config={"model_type": "lfm3", **sizes(tok), "head_dim": 8, "sliding_window": 8, "layer_types": kinds},
        vision_config=vision,
        projector_hidden_size=48,
        **{f"{name}_id": tok.convert_tokens_to_ids(token) for name, token in names.items()},
    )
    images = Qwen2VLImageProcessorPil(patch_size=8, size=PIXELS)
    processor = Lfm3VlProcessor(images, tok, Qwen3VLVideoProcessor(patch_size=8, size=PIXELS))
    return Lfm3VlForConditionalGeneration(config), processor


FAMILIES = [
    Family("lfm2_vl", lfm2_vl, "<image>{text}"),
    Family("lfm3_vl", lfm3_vl, "<|vision_start|><|image_pad|><|vision_end|>{text}"),
]
