# SPDX-License-Identifier: Apache-2.0
"""PaliGemma, Gemma and their kin."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3nAudioFeatureExtractor,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma3nProcessor,
    Gemma3Processor,
    Gemma4AudioFeatureExtractor,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4ImageProcessorPil,
    Gemma4Processor,
    Gemma4UnifiedAudioFeatureExtractor,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedImageProcessor,
    Gemma4UnifiedProcessor,
    Gemma4UnifiedVideoProcessor,
    Gemma4VideoProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    ShieldGemma2Config,
    ShieldGemma2Processor,
    SiglipImageProcessorPil,
    T5Gemma2Config,
    T5Gemma2ForConditionalGeneration,
)

from tests import tiny_models
from tests.families.parts import ids
from tests.families.registry import Family
from tests.tiny_models import HIDDEN, TOWER, sizes, tokenizer, without_video

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


_MIXED = ["sliding_attention", "full_attention", "full_attention"]
_SIGLIP = {"model_type": "siglip_vision_model", **TOWER}
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


def _gemma3_parts() -> tuple[Any, dict[str, Any], Any]:
    """Tokenizer, configuration, image processor."""
    torch.manual_seed(0)
    tok = tokenizer(_GEMMA3, [])
    parts = {
        "text_config": {**sizes(tok), "head_dim": 8, "sliding_window": 8, "layer_types": _MIXED},
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4,
        **ids(tok, image_token_index="<image_soft_token>", boi_token_index="<start_of_image>"),
        **ids(tok, eoi_token_index="<end_of_image>"),
    }
    return tok, parts, Gemma3ImageProcessorPil(size={"height": 32, "width": 32})


def gemma3() -> tuple[Any, Any]:
    """Gemma 3: pooled SigLIP features, sliding windows, attention in both directions within an image."""
    tok, parts, images = _gemma3_parts()
    model = Gemma3ForConditionalGeneration(Gemma3Config(**parts))
    return model, Gemma3Processor(images, tok, image_seq_length=4)


def shieldgemma2() -> tuple[Any, Any]:
    """ShieldGemma 2: its processor turns an image into questions, one for each policy, and reads no text."""
    tok, parts, images = _gemma3_parts()
    template = (
        "{% for message in messages %}{% for part in message.content %}"
        "{{ '<start_of_image>' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}"
    )
    processor = ShieldGemma2Processor(images, tok, chat_template=template, image_seq_length=4)
    return Gemma3ForConditionalGeneration(ShieldGemma2Config(**parts)), processor


def t5gemma2() -> tuple[Any, Any]:
    """T5Gemma 2: an encoder reads image and text."""
    tok, parts, images = _gemma3_parts()
    decoder = parts["text_config"]
    config = T5Gemma2Config(encoder=parts, decoder=decoder, image_token_index=parts["image_token_index"])
    return T5Gemma2ForConditionalGeneration(config), Gemma3Processor(images, tok, image_seq_length=4)


def gemma3n() -> tuple[Any, Any]:
    """Gemma 3n: several residual streams side by side."""
    torch.manual_seed(0)
    tok = tokenizer({}, ["<start_of_image>", "<start_of_audio>"])
    text = sizes(tok)
    marks = {
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
        "eoa_token": "<end_of_audio>",
        "audio_token": "<audio_soft_token>",
    }
    tok = PreTrainedTokenizerFast(
        tokenizer_object=tok.backend_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"boi_token": "<start_of_image>", "boa_token": "<start_of_audio>", **marks},
    )
    config = Gemma3nConfig(
        text_config={
            **text,
            "vocab_size": len(tok),
            "vocab_size_per_layer_input": text["vocab_size"],
            "hidden_size_per_layer_input": 8,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": _MIXED,
            "altup_num_inputs": 2,
            "num_kv_shared_layers": 1,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0],
        },
        vision_config={
            "architecture": "test_resnet",
            "hidden_size": 96,
            "vocab_size": 2,
            "vocab_offset": text["vocab_size"],
        },
        audio_config={
            "vocab_size": 2,
            "vocab_offset": text["vocab_size"] + 2,
            "hidden_size": 16,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": [4, 4],
        },
        vision_soft_tokens_per_image=4,
        **ids(tok, boi_token_id="<start_of_image>", eoi_token_id="<end_of_image>", image_token_id="<image_soft_token>"),
        **ids(tok, boa_token_id="<start_of_audio>", eoa_token_id="<end_of_audio>", audio_token_id="<audio_soft_token>"),
    )
    images = SiglipImageProcessorPil(size={"height": 64, "width": 64})
    processor = Gemma3nProcessor(Gemma3nAudioFeatureExtractor(), images, tok, image_seq_length=4)
    return Gemma3nForConditionalGeneration(config), processor


def _gemma4_tokenizer() -> Any:
    torch.manual_seed(0)
    return tokenizer(_GEMMA4, ["<|video|>"])


def _gemma4_processor(tok: Any, *, videos: bool = True) -> Any:
    images = Gemma4ImageProcessorPil(patch_size=4, max_soft_tokens=70)
    if not videos:
        return without_video(Gemma4Processor)(Gemma4AudioFeatureExtractor(), images, tok, None)
    processor = Gemma4VideoProcessor(patch_size=4, max_soft_tokens=70)
    return Gemma4Processor(Gemma4AudioFeatureExtractor(), images, tok, processor)


def gemma4() -> tuple[Any, Any]:
    """Gemma 4 E: images of any shape, inputs for each layer, layers that share keys and values."""
    tok = _gemma4_tokenizer()
    config = Gemma4Config(
        text_config={
            **sizes(tok),
            **_GEMMA4_TEXT,
            "vocab_size_per_layer_input": len(tok),
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 1,
        },
        vision_config=_GEMMA4_TOWER,
        **ids(tok, **_GEMMA4_IDS),
    )
    return Gemma4ForConditionalGeneration(config), _gemma4_processor(tok, videos=False)


def gemma4_moe() -> tuple[Any, Any]:
    """Gemma 4 A4B: experts, attention in both directions within an image."""
    tok = _gemma4_tokenizer()
    config = Gemma4Config(
        text_config={
            **sizes(tok),
            **_GEMMA4_TEXT,
            **_GEMMA4_EXPERTS,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
        },
        vision_config=_GEMMA4_TOWER,
        **ids(tok, **_GEMMA4_IDS),
    )
    return Gemma4ForConditionalGeneration(config), _gemma4_processor(tok)


def gemma4_unified() -> tuple[Any, Any]:
    """Gemma 4 without towers: patches are projected into the decoder."""
    tok = _gemma4_tokenizer()
    config = Gemma4UnifiedConfig(
        text_config={**sizes(tok), **_GEMMA4_TEXT},
        vision_config={
            "patch_size": 4,
            "mm_embed_dim": 48,
            "mm_posemb_size": 128,
            "output_proj_dims": 48,
        },
        audio_config={"audio_embed_dim": 16},
        **ids(tok, **_GEMMA4_IDS),
    )
    images = Gemma4UnifiedImageProcessor(patch_size=4, max_soft_tokens=70)
    videos = Gemma4UnifiedVideoProcessor(patch_size=4, max_soft_tokens=70)
    processor = Gemma4UnifiedProcessor(Gemma4UnifiedAudioFeatureExtractor(), images, tok, videos)
    return Gemma4UnifiedForConditionalGeneration(config), processor


def diffusion_gemma() -> tuple[Any, Any]:
    """DiffusionGemma: an encoder reads image and text, a decoder refines a random canvas."""
    tok = _gemma4_tokenizer()
    config = DiffusionGemmaConfig(
        text_config={**sizes(tok), **_GEMMA4_TEXT, **_GEMMA4_EXPERTS},
        vision_config={"model_type": "gemma4_vision", **_GEMMA4_TOWER},
        canvas_length=8,
        **{field: value for field, value in ids(tok, **_GEMMA4_IDS).items() if field in _IMAGE_IDS},
    )
    return DiffusionGemmaForBlockDiffusion(config), _gemma4_processor(tok)


_GEMMA4_TEXT = {"head_dim": 8, "global_head_dim": 16, "sliding_window": 8, "layer_types": _MIXED}
_GEMMA4_EXPERTS = {
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "use_bidirectional_attention": "vision",
}
_IMAGE_IDS = ("image_token_id", "boi_token_id", "eoi_token_id")

FAMILIES = [
    Family("paligemma", tiny_models.paligemma, "<image>{text}", short=True),
    Family("paligemma (PaliGemma 2)", paligemma2, "<image>{text}"),
    Family("gemma3", gemma3, "<start_of_image>{text}", short=True),
    Family("shieldgemma2", shieldgemma2, refused="text", note="its processor asks questions of its own"),
    Family("t5gemma2", t5gemma2, refused="encoder-decoder"),
    Family("gemma3n", gemma3n, refused="residual streams"),
    Family("gemma4", gemma4, "<|image|>{text}", short=True),
    Family("gemma4 (A4B)", gemma4_moe, "<|image|>{text}"),
    Family("gemma4_unified", gemma4_unified, "<|image|>{text}"),
    Family("diffusion_gemma", diffusion_gemma, refused="encoder", note="its decoder refines a random canvas"),
]
