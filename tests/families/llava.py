# SPDX-License-Identifier: Apache-2.0
"""LLaVA and its descendants in transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests import tiny_models
from tests.families.registry import Family
from tests.tiny_models import TOWER, sizes, tokenizer, without_video

_PINPOINTS = [[32, 32], [32, 64], [64, 32], [64, 64]]
_SQUARE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
_PATCHES = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def _clip_llama(kind: str, tok: Any, **options: Any) -> Any:
    """A model of one of the classes that put CLIP before a Llama."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vision_config={"model_type": "clip_vision_model", **TOWER},
        text_config={"model_type": "llama", **sizes(tok)},
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        **options,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def llava_next() -> tuple[Any, Any]:
    """The whole image and its tiles, of each row a learned newline behind it."""
    tok = tokenizer({"image_token": "<image>"}, [])
    images = transformers.LlavaNextImageProcessorPil(**_SQUARE, image_grid_pinpoints=_PINPOINTS)
    processor = transformers.LlavaNextProcessor(images, tok, **_PATCHES)
    return _clip_llama("LlavaNext", tok, image_grid_pinpoints=_PINPOINTS), processor


def llava_onevision() -> tuple[Any, Any]:
    """As LLaVA-NeXT, with SigLIP and Qwen2."""
    torch.manual_seed(0)
    tok = tokenizer({"image_token": "<image>", "video_token": "<video>"}, [])
    config = transformers.LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER},
        text_config={"model_type": "qwen2", **sizes(tok)},
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        video_token_index=tok.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=_PINPOINTS,
    )
    images = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": 32, "width": 32}, image_grid_pinpoints=_PINPOINTS
    )
    processor = without_video(transformers.LlavaOnevisionProcessor)(
        images, tok, num_image_tokens=16, vision_feature_select_strategy="full"
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), processor


def llava_next_video() -> tuple[Any, Any]:
    """As LLaVA-NeXT; the frames of a video are pooled."""
    tok = tokenizer({"image_token": "<image>", "video_token": "<video>"}, [])
    model = _clip_llama(
        "LlavaNextVideo",
        tok,
        video_token_index=tok.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=_PINPOINTS,
    )
    images = transformers.LlavaNextImageProcessorPil(**_SQUARE, image_grid_pinpoints=_PINPOINTS)
    videos = transformers.LlavaNextVideoVideoProcessor(**_SQUARE)
    return model, transformers.LlavaNextVideoProcessor(videos, images, tok, **_PATCHES)


def vipllava() -> tuple[Any, Any]:
    """Features of several layers of CLIP side by side."""
    tok = tokenizer({"image_token": "<image>"}, [])
    images = transformers.CLIPImageProcessorPil(**_SQUARE)
    processor = transformers.LlavaProcessor(images, tok, **_PATCHES)
    return _clip_llama("VipLlava", tok, vision_feature_layer=[-2, -1, 1]), processor


def video_llava() -> tuple[Any, Any]:
    """Two towers, one for images and one for videos."""
    tok = tokenizer({"image_token": "<image>", "video_token": "<video>"}, [])
    model = _clip_llama("VideoLlava", tok, video_token_index=tok.convert_tokens_to_ids("<video>"))
    images, videos = transformers.VideoLlavaImageProcessor(**_SQUARE), transformers.VideoLlavaVideoProcessor(**_SQUARE)
    return model, transformers.VideoLlavaProcessor(images, videos, tok, **_PATCHES)


def fast_vlm() -> tuple[Any, Any]:
    """LLaVA's processor, a convolutional tower of timm's and Qwen2."""
    torch.manual_seed(0)
    tok = tokenizer({"image_token": "<image>"}, [])
    config = transformers.FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "fastvit_t8",
            "hidden_size": 64,
            "model_args": {"inference_mode": True, "embed_dims": (8, 8, 16, 32), "layers": (1, 1, 1, 1)},
        },
        text_config={"model_type": "qwen2", **sizes(tok)},
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        image_seq_length=9,
    )
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    processor = transformers.LlavaProcessor(
        images, tok, patch_size=32, vision_feature_select_strategy="full", num_additional_image_tokens=0
    )
    return transformers.FastVlmForConditionalGeneration(config), processor


FAMILIES = [
    Family("llava", tiny_models.llava, "<image>{text}", short=True),
    Family("llava_next", llava_next, "<image>{text}", short=True, note="tiles; the learned newlines count as vision"),
    Family("llava_onevision", llava_onevision, "<image>{text}", short=True, note="tiles, newlines as vision"),
    Family("llava_next_video", llava_next_video, "<image>{text}", note="tiles, newlines as vision"),
    Family("vipllava", vipllava, "<image>{text}"),
    Family("video_llava", video_llava, "<image>{text}"),
    Family("fast_vlm", fast_vlm, "<image>{text}"),
]
