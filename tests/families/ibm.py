# SPDX-License-Identifier: Apache-2.0
"""Models of IBM."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Granite4VisionConfig,
    Granite4VisionForConditionalGeneration,
    Granite4VisionProcessor,
    GraniteDoclingConfig,
    GraniteDoclingForConditionalGeneration,
    GraniteDoclingImageProcessorPil,
    GraniteDoclingProcessor,
    LlavaNextImageProcessorPil,
)

from tests.families.parts import ids
from tests.families.registry import Family
from tests.tiny_models import HIDDEN, TOWER, sizes, tokenizer


def granite4_vision() -> tuple[Any, Any]:
    """Granite 4 Vision: tiles with newlines, features of the tower added before several layers."""
    torch.manual_seed(0)
    tok = tokenizer({"image_token": "<image>"}, [])
    grid = [[32, 64], [64, 32], [64, 64]]
    config = Granite4VisionConfig(
        text_config=sizes(tok),
        vision_config={"model_type": "siglip_vision_model", **TOWER, "hidden_size": 64},
        qformer_config={
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": 48,
            "cross_attention_frequency": 1,
            "use_qformer_text_input": False,
        },
        image_grid_pinpoints=grid,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        deepstack_layer_map=[[-2, 1], [-1, 0]],
        spatial_target_layers=[1, 2],
        projector_dropout=0.0,
        **ids(tok, image_token_index="<image>"),
    )
    square = {"height": 32, "width": 32}
    images = LlavaNextImageProcessorPil(size=square, crop_size=square, image_grid_pinpoints=grid)
    processor = Granite4VisionProcessor(
        images, tok, patch_size=8, vision_feature_select_strategy="full", downsample_rate="1/2"
    )
    return Granite4VisionForConditionalGeneration(config), processor


def granite_docling() -> tuple[Any, Any]:
    """Granite Docling: tiles with their row and column, features of the tower added to early layers."""
    torch.manual_seed(0)
    places = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tok = tokenizer({"image_token": "<image>"}, ["<fake_token_around_image>", "<global-img>", *places])
    config = GraniteDoclingConfig(
        text_config=sizes(tok),
        vision_config={
            **TOWER,
            "out_hidden_size": HIDDEN,
            "scale_factor": 2,
            "deepstack_visual_indexes": [0, 1],
            "use_fine_route": False,
        },
        pad_token_id=tok.pad_token_id,
        **ids(tok, image_token_id="<image>"),
    )
    images = GraniteDoclingImageProcessorPil(size={"height": 32, "width": 32}, max_patches=4)
    return GraniteDoclingForConditionalGeneration(config), GraniteDoclingProcessor(images, tok, image_seq_len=4)


FAMILIES = [
    Family("granite4_vision", granite4_vision, "<image>{text}"),
    Family("granite_docling", granite_docling, "<image>{text}"),
]
