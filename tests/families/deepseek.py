# SPDX-License-Identifier: Apache-2.0
"""DeepSeek's, and Unlimited-OCR, which is built on DeepSeek-OCR."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DeepseekOcr2Config,
    DeepseekOcr2ForConditionalGeneration,
    DeepseekOcr2ImageProcessorPil,
    DeepseekOcr2Processor,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
    DeepseekVLHybridImageProcessorPil,
    DeepseekVLHybridProcessor,
    DeepseekVLImageProcessorPil,
    DeepseekVLProcessor,
    UnlimitedOcrConfig,
    UnlimitedOcrForConditionalGeneration,
    UnlimitedOcrImageProcessor,
    UnlimitedOcrProcessor,
)

from tests.families.registry import Family
from tests.tiny_models import TOWER, sizes, tokenizer

SQUARE = {"height": 32, "width": 32}
SIGLIP = {"model_type": "siglip_vision_model", **TOWER}
SAM = {
    "hidden_size": 24,
    "output_channels": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "window_size": 3,
    "global_attn_indexes": [1],
    "mlp_dim": 48,
    "initializer_range": 0.1,
}
EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}


def deepseek_vl() -> tuple[Any, Any]:
    """DeepSeek-VL."""
    torch.manual_seed(0)
    tok = tokenizer({"image_token": "<image_placeholder>"}, [])
    config = DeepseekVLConfig(
        text_config={"model_type": "llama", **sizes(tok)}, vision_config=SIGLIP, image_token_id=tok.image_token_id
    )
    images = DeepseekVLImageProcessorPil(size=SQUARE)
    return DeepseekVLForConditionalGeneration(config), DeepseekVLProcessor(images, tok, num_image_tokens=16)


def deepseek_vl_hybrid() -> tuple[Any, Any]:
    """DeepSeek-VL with a second tower for a larger view of the image."""
    torch.manual_seed(0)
    tok = tokenizer({"image_token": "<image_placeholder>"}, [])
    config = DeepseekVLHybridConfig(
        text_config={"model_type": "llama", **sizes(tok)},
        vision_config=SIGLIP,
        high_res_vision_config={"model_type": "sam_vision_model", **SAM, "image_size": 64, "patch_size": 8},
        image_token_id=tok.image_token_id,
    )
    images = DeepseekVLHybridImageProcessorPil(size=SQUARE, high_res_size={"height": 64, "width": 64})
    processor = DeepseekVLHybridProcessor(images, tok, num_image_tokens=16)
    return DeepseekVLHybridForConditionalGeneration(config), processor


def deepseek_ocr2() -> tuple[Any, Any]:
    """DeepSeek-OCR 2: a language model as the vision encoder; local tiles, then the whole image, then a separator."""
    torch.manual_seed(0)
    tok = tokenizer({"image_token": "<image>"}, [])
    encoder = {**sizes(tok), "hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    sam = {**SAM, "image_size": 192, "patch_size": 4, "downsample_channels": [16, 24]}
    config = DeepseekOcr2Config(
        text_config={**sizes(tok), **EXPERTS},
        vision_config={"sam_config": sam, "encoder_config": encoder},
        image_token_id=tok.image_token_id,
    )
    images = DeepseekOcr2ImageProcessorPil(size={"height": 192, "width": 192}, tile_size=192)
    return DeepseekOcr2ForConditionalGeneration(config), DeepseekOcr2Processor(images, tok, patch_size=4)


def unlimited_ocr() -> tuple[Any, Any]:
    """Unlimited-OCR: text sees the last few tokens of text, and all of the image."""
    torch.manual_seed(0)
    tok = tokenizer({"image_token": "<image>"}, [])
    sam = {**SAM, "image_size": 64, "patch_size": 4, "downsample_channels": (16, 24)}
    encoder = {**TOWER, "image_size": 64, "patch_size": 16}
    config = UnlimitedOcrConfig(
        text_config={**sizes(tok), **EXPERTS, "sliding_window": 8},
        vision_config={"sam_config": sam, "encoder_config": encoder},
        image_token_id=tok.image_token_id,
    )
    images = UnlimitedOcrImageProcessor(size={"height": 64, "width": 64}, tile_size=32, maximum_pad_value=32)
    return UnlimitedOcrForConditionalGeneration(config), UnlimitedOcrProcessor(images, tok, patch_size=4)


FAMILIES = [
    Family("deepseek_ocr2", deepseek_ocr2, "<image>{text}"),
    Family("deepseek_vl", deepseek_vl, "<image_placeholder>{text}"),
    Family("deepseek_vl_hybrid", deepseek_vl_hybrid, "<image_placeholder>{text}"),
    Family("unlimited_ocr", unlimited_ocr, "<image>{text}"),
]
