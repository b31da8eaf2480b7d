# SPDX-License-Identifier: Apache-2.0
"""MiniCPM-V: slices, each between markers that the processor adds, and a Qwen3.5 decoder."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    MiniCPMOcrConfig,
    MiniCPMOcrForConditionalGeneration,
    MiniCPMOcrImageProcessor,
    MiniCPMOcrProcessor,
    MiniCPMOcrVideoProcessor,
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_6ImageProcessorPil,
    MiniCPMV4_6Processor,
    MiniCPMV4_6VideoProcessor,
    MiniCPMV4_7Config,
    MiniCPMV4_7ForConditionalGeneration,
    MiniCPMV4_7Processor,
)

from tests.families.registry import Family
from tests.tiny_models import sizes, tokenizer

NAMES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}
PROMPT = "<|image_pad|>{text}"


def _make(config: type, model: type, processor: type, images: type, videos: type, **more: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    tok = tokenizer(NAMES, [])
    text = {
        "model_type": "qwen3_5_text",
        **sizes(tok),
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]},
    }
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 8,
    }
    ids = {"image_token_id": tok.image_token_id, "video_token_id": tok.video_token_id}
    slices = {"scale_resolution": 32, "patch_size": 8, "max_slice_nums": 4}
    whole = config(text_config=text, vision_config=vision, insert_layer_id=1, **ids, **more)
    return model(whole), processor(images(**slices), videos(**slices), tok)


def minicpmv4_6() -> tuple[Any, Any]:
    """MiniCPM-V 4.6."""
    parts = (MiniCPMV4_6ImageProcessorPil, MiniCPMV4_6VideoProcessor)
    return _make(MiniCPMV4_6Config, MiniCPMV4_6ForConditionalGeneration, MiniCPMV4_6Processor, *parts)


def minicpmv4_7() -> tuple[Any, Any]:
    """MiniCPM-V 4.7: positions on a canvas, which need the ids of all markers."""
    tok = tokenizer(NAMES, [])
    ids = {
        name.replace("_token", "_id"): tok.convert_tokens_to_ids(NAMES[name])
        for name in ("image_start_token", "image_end_token", "slice_start_token", "slice_end_token")
    }
    ids["newline_id"] = tok("\n").input_ids[0]
    parts = (MiniCPMV4_6ImageProcessorPil, MiniCPMV4_6VideoProcessor)
    return _make(MiniCPMV4_7Config, MiniCPMV4_7ForConditionalGeneration, MiniCPMV4_7Processor, *parts, **ids)


def minicpm_ocr() -> tuple[Any, Any]:
    """MiniCPM-OCR: four times as many tokens an image."""
    parts = (MiniCPMOcrImageProcessor, MiniCPMOcrVideoProcessor)
    return _make(MiniCPMOcrConfig, MiniCPMOcrForConditionalGeneration, MiniCPMOcrProcessor, *parts)


FAMILIES = [
    Family("minicpm_ocr", minicpm_ocr, PROMPT),
    Family("minicpmv4_6", minicpmv4_6, PROMPT),
    Family("minicpmv4_7", minicpmv4_7, PROMPT),
]
