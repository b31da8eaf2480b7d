# SPDX-License-Identifier: Apache-2.0
"""PaliGemma, Gemma and their kin."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessorPil,
    Gemma4Processor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessorPil,
)

from tests import tiny_models
from tests.families.parts import TOWER, ids, sizes, tokenizer, without_video
from tests.families.registry import Family
from tests.tiny_models import HIDDEN

_GEMMA3 = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
_GEMMA4 = {
    "image_token": "<|image|>",
    "boi_token": "<|image>",
    "eoi_token": "<image|>",
    "audio_token": "<|audio|>",
    "boa_token": "<|audio>",
    "eoa_token": "<audio|>",
}
_GEMMA4_IDS = {
    "image_token_id": "<|image|>",
    "boi_token_id": "<|image>",
    "eoi_token_id": "<image|>",
    "video_token_id": "<|video|>",
    "audio_token_id": "<|audio|>",
    "boa_token_id": "<|audio>",
    "eoa_token_index": "<audio|>",
}


def paligemma2() -> tuple[Any, Any]:
    """PaliGemma 2: as PaliGemma, with sliding windows and soft caps in the decoder."""
    torch.manual_seed(0)
    tok = tokenizer({"image_token": "<image>"}, [])
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, tok)
    config = PaliGemmaConfig(
        text_config={"model_type": "gemma2", "head_dim": 8, "sliding_window": 8, **sizes(tok)},
        vision_config={"model_type": "siglip_vision_model", **TOWER},
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        projection_dim=HIDDEN,
    )
    return PaliGemmaForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    """Gemma 3: pooled SigLIP features, sliding windows, attention in both directions within an image."""
    torch.manual_seed(0)
    tok = tokenizer(_GEMMA3, [])
    config = Gemma3Config(
        text_config={"head_dim": 8, "sliding_window": 8, "layer_types": _MIXED, **sizes(tok)},
        vision_config={"model_type": "siglip_vision_model", **TOWER},
        mm_tokens_per_image=4,
        **ids(tok, image_token_index="<image_soft_token>", boi_token_index="<start_of_image>"),
        **ids(tok, eoi_token_index="<end_of_image>"),
    )
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    return Gemma3ForConditionalGeneration(config), Gemma3Processor(images, tok, image_seq_length=4)


def gemma4() -> tuple[Any, Any]:
    """Gemma 4: images of any shape, inputs for each layer, layers that share keys and values."""
    torch.manual_seed(0)
    tok = tokenizer(_GEMMA4, ["<|video|>"])
    config = Gemma4Config(
        text_config={
            **sizes(tok),
            "head_dim": 8,
            "global_head_dim": 16,
            "sliding_window": 8,
            "layer_types": _MIXED,
            "vocab_size_per_layer_input": len(tok),
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 1,
            "use_bidirectional_attention": "vision",
        },
        vision_config=_GEMMA4_TOWER,
        **ids(tok, **_GEMMA4_IDS),
    )
    images = Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70)
    processor = without_video(Gemma4Processor)(Gemma4AudioFeatureExtractor(), images, tok, None)
    return Gemma4ForConditionalGeneration(config), processor


_MIXED = ["sliding_attention", "full_attention", "full_attention"]
_GEMMA4_TOWER = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "patch_size": 4,
    "position_embedding_size": 128,
}

FAMILIES = [
    Family("paligemma", tiny_models.paligemma, "<image>{text}", short=True),
    Family("paligemma (PaliGemma 2)", paligemma2, "<image>{text}"),
    Family("gemma3", gemma3, "<start_of_image>{text}", short=True),
    Family("gemma4", gemma4, "<|image|>{text}", short=True),
]
