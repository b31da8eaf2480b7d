# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Cosmos3EdgeConfig,
    Cosmos3EdgeForConditionalGeneration,
    Cosmos3EdgeImageProcessorPil,
    Cosmos3EdgeProcessor,
    Cosmos3EdgeVideoProcessor,
    Cosmos3OmniConfig,
    Cosmos3OmniForConditionalGeneration,
    NemotronH_Omni_Reasoning_V3,
    NemotronH_Omni_Reasoning_V3_Config,
    NemotronH_Omni_Reasoning_V3ImageProcessor,
    NemotronH_Omni_Reasoning_V3Processor,
    NemotronH_Omni_Reasoning_V3VideoProcessor,
    ParakeetFeatureExtractor,
    Qwen2VLImageProcessorPil,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from tests.families.registry import Family
from tests.tiny_models import HIDDEN, LAYERS, sizes, tokenizer

QWEN_MARKUP = "<|vision_start|><|image_pad|><|vision_end|>{text}"
PIXELS = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}


def _qwen_tokens() -> tuple[Any, dict[str, int]]:
    torch.manual_seed(0)
    names = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    tok = tokenizer(names, [])
    return tok, {f"{name}_id": tok.convert_tokens_to_ids(token) for name, token in names.items()}


def cosmos3_edge() -> tuple[Any, Any]:
    """Cosmos3 Edge: multimodal positions, whose mm_token_type_ids its processor returns on request only."""
    tok, ids = _qwen_tokens()
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 8,
        "num_patches": 16,
    }
    config = Cosmos3EdgeConfig(
        text_config={**sizes(tok), "head_dim": 8, "rope_parameters": rope},
        vision_config=vision,
        projector_hidden_size=48,
        **ids,
    )
    grid = {"patch_size": 8, "size": PIXELS}
    processor = Cosmos3EdgeProcessor(Cosmos3EdgeImageProcessorPil(**grid), tok, Cosmos3EdgeVideoProcessor(**grid))
    return Cosmos3EdgeForConditionalGeneration(config), processor


def _with_types(processor: Any, images: Any, prompt: str) -> dict[str, Any]:
    return dict(processor(images=[images], text=[prompt], return_tensors="pt", return_mm_token_type_ids=True))


def cosmos3_omni() -> tuple[Any, Any]:
    """Cosmos3 Omni: a Qwen3-VL, with features added between layers."""
    tok, ids = _qwen_tokens()
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    vision = {
        "depth": 2,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 8,
        "out_hidden_size": HIDDEN,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": list(range(LAYERS - 1)),
    }
    config = Cosmos3OmniConfig(
        text_config={**sizes(tok), "head_dim": 8, "rope_parameters": rope}, vision_config=vision, **ids
    )
    images = Qwen2VLImageProcessorPil(patch_size=8, size=PIXELS)
    processor = Qwen3VLProcessor(images, tok, Qwen3VLVideoProcessor(patch_size=8, size=PIXELS))
    return Cosmos3OmniForConditionalGeneration(config), processor


def nemotron_h_omni() -> tuple[Any, Any]:
    """Nemotron 3 Nano Omni: a RADIO tower, and a decoder of Mamba, attention and MLP layers."""
    torch.manual_seed(0)
    special = {"image_token": "<image>", "image_start_token": "<img>", "image_end_token": "</img>"}
    tok = tokenizer(special, ["<so_embedding>", "<so_start>", "<so_end>"])
    text = {
        **sizes(tok),
        "model_type": "nemotron_h",
        "layers_block_type": ["linear_attention", "full_attention", "mlp"],
        "head_dim": 8,
        "ssm_state_size": 8,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 8,
    }
    vision = {
        "model_type": "radio",
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 2.0,
        "patch_size": 8,
        "image_size": 64,
        "max_img_size": 64,
        "video_temporal_patch_size": 2,
    }
    config = NemotronH_Omni_Reasoning_V3_Config(
        text_config=text,
        vision_config=vision,
        vision_hidden_size=24,
        projector_hidden_size=48,
        image_token_id=tok.image_token_id,
    )
    images = NemotronH_Omni_Reasoning_V3ImageProcessor(patch_size=8, min_num_patches=16, max_num_patches=64)
    norm = {"norm_mean": images.image_mean, "norm_std": images.image_std}
    videos = NemotronH_Omni_Reasoning_V3VideoProcessor(patch_size=8, video_target_num_patches=16, **norm)
    processor = NemotronH_Omni_Reasoning_V3Processor(images, videos, tok, ParakeetFeatureExtractor())
    return NemotronH_Omni_Reasoning_V3(config), processor


FAMILIES = [
    Family("cosmos3_edge", cosmos3_edge, QWEN_MARKUP, encode=_with_types, note="needs mm_token_type_ids"),
    Family("cosmos3_omni", cosmos3_omni, QWEN_MARKUP),
    Family("nemotron_h_omni", nemotron_h_omni, "<image>{text}"),
]
