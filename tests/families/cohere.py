# SPDX-License-Identifier: Apache-2.0
"""Models of Cohere."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Cohere2VisionImageProcessor,
    Cohere2VisionProcessor,
    CohereCompassConfig,
    CohereCompassForConditionalGeneration,
    CohereCompassImageProcessorPil,
    CohereCompassProcessor,
    CohereCompassVideoProcessor,
    GotOcr2ImageProcessorPil,
)

from tests.families.parts import ids
from tests.families.registry import Family
from tests.tiny_models import HIDDEN, TOWER, sizes, tokenizer


def aya_vision() -> tuple[Any, Any]:
    """Aya Vision: tiles with their numbers as text, sliding windows."""
    torch.manual_seed(0)
    marks = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"]
    tok = tokenizer({}, ["<image>", *marks, "TILE", "TILE_GLOBAL", *(f"TILE_{tile}" for tile in range(1, 5))])
    config = AyaVisionConfig(
        text_config={"model_type": "cohere2", "sliding_window": 16, **sizes(tok)},
        vision_config={"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False},
        **ids(tok, image_token_index="<|IMG_PATCH|>"),
    )
    images = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=4, crop_to_patches=True)
    processor = AyaVisionProcessor(images, tok, patch_size=8, img_size=32, downsample_factor=2)
    return AyaVisionForConditionalGeneration(config), processor


def cohere2_vision() -> tuple[Any, Any]:
    """Command A Vision: tiles that end with a line break."""
    torch.manual_seed(0)
    marks = {"boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>", "image_token": "<|IMG_PATCH|>"}
    tok = tokenizer({**marks, "img_line_break_token": "<|IMG_LINE_BREAK|>"}, [])
    config = Cohere2VisionConfig(
        text_config={"model_type": "cohere2", "sliding_window": 16, **sizes(tok)},
        vision_config={"model_type": "siglip_vision_model", **TOWER},
        alignment_intermediate_size=48,
        **ids(tok, image_token_id="<|IMG_PATCH|>"),
    )
    images = Cohere2VisionImageProcessor(size={"height": 32, "width": 32}, max_patches=4, patch_size=2)
    return Cohere2VisionForConditionalGeneration(config), Cohere2VisionProcessor(images, tok)


_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def cohere_compass() -> tuple[Any, Any]:
    """Compass: dynamic resolution, features added between layers."""
    torch.manual_seed(0)
    marks = ["<|VISION_START|>", "<|VISION_END|>", "<|IMAGE_PAD|>", "<|VIDEO_PAD|>"]
    tok = tokenizer({}, marks)
    config = CohereCompassConfig(
        text_config={
            **sizes(tok),
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {"sliding_attention": _MROPE, "full_attention": None},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": 8,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        **ids(tok, image_token_id="<|IMAGE_PAD|>", video_token_id="<|VIDEO_PAD|>"),
        **ids(tok, vision_start_token_id="<|VISION_START|>", vision_end_token_id="<|VISION_END|>"),
    )
    images = CohereCompassImageProcessorPil(patch_size=8, min_pixels=32 * 32, max_pixels=64 * 64)
    videos = CohereCompassVideoProcessor(patch_size=8, size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128})
    return CohereCompassForConditionalGeneration(config), CohereCompassProcessor(images, tok, videos)


FAMILIES = [
    Family("aya_vision", aya_vision, "<image>{text}"),
    Family("cohere2_vision", cohere2_vision, "<|IMG_PATCH|>{text}"),
    Family("cohere_compass", cohere_compass, "<|VISION_START|><|IMAGE_PAD|><|VISION_END|>{text}"),
]
