# SPDX-License-Identifier: Apache-2.0
"""Qwen's families: images of any size in merged patches, multimodal positions, start and end tokens in the prompt."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests import tiny_models
from tests.families.registry import Family
from tests.tiny_models import HIDDEN, sizes, tokenizer, without_video

_PROMPT = "<|vision_start|><|image_pad|><|vision_end|>{text}"
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8}
_WINDOWS = {**_VISION, "out_hidden_size": HIDDEN, "window_size": 32, "fullatt_block_indexes": [1]}
_LEARNED = {**_VISION, "out_hidden_size": HIDDEN, "num_position_embeddings": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LINEAR = {
    "head_dim": 32,
    "rope_parameters": {**_ROPE, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def _tokenizer() -> Any:
    return tokenizer({}, ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])


def _model(kind: str, tok: Any, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        text_config={**sizes(tok), **text},
        vision_config=vision,
        image_token_id=tok.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tok.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tok.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tok.convert_tokens_to_ids("<|vision_end|>"),
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def images(**options: Any) -> Any:
    """Qwen's image processor, for images of 16 to 64 patches."""
    return transformers.Qwen2VLImageProcessorPil(patch_size=8, min_pixels=32 * 32, max_pixels=64 * 64, **options)


def videos(kind: str = "Qwen2VL", **options: Any) -> Any:
    """A video processor, which needs torchvision."""
    processor = getattr(transformers, f"{kind}VideoProcessor")
    return processor(patch_size=8, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64 * 4}, **options)


def qwen2_vl() -> tuple[Any, Any]:
    """Multimodal positions in the decoder."""
    tok = _tokenizer()
    vision = {**_VISION, "embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2}
    model = _model("Qwen2VL", tok, {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}, vision)
    return model, transformers.Qwen2VLProcessor(images(), tok, videos())


def qwen2_5_vl_sliding() -> tuple[Any, Any]:
    """Sliding attention in the last layer."""
    tok = _tokenizer()
    text = {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}, "use_sliding_window": True}
    model = _model("Qwen2_5_VL", tok, {**text, "sliding_window": 8, "max_window_layers": 2}, _WINDOWS)
    return model, transformers.Qwen2_5_VLProcessor(images(), tok, videos())


def qwen3_vl() -> tuple[Any, Any]:
    """Features of the tower's layers added between the decoder's."""
    tok = _tokenizer()
    text = {"head_dim": 16, "rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True}}
    model = _model("Qwen3VL", tok, text, {**_LEARNED, "deepstack_visual_indexes": [0, 1]})
    return model, without_video(transformers.Qwen3VLProcessor)(images(), tok)


def qwen3_vl_moe() -> tuple[Any, Any]:
    """As Qwen3-VL, with experts."""
    tok = _tokenizer()
    rope = {**_ROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {"head_dim": 16, "rope_parameters": rope, **_EXPERTS}
    model = _model("Qwen3VLMoe", tok, text, {**_LEARNED, "deepstack_visual_indexes": [0, 1]})
    return model, transformers.Qwen3VLProcessor(images(), tok, videos("Qwen3VL"))


def qwen3_5() -> tuple[Any, Any]:
    """Linear attention in two layers of three."""
    tok = _tokenizer()
    model = _model("Qwen3_5", tok, {**_LINEAR, "full_attention_interval": 3}, _LEARNED)
    return model, without_video(transformers.Qwen3VLProcessor)(images(), tok)


def qwen3_5_moe() -> tuple[Any, Any]:
    """As Qwen3.5, with experts."""
    tok = _tokenizer()
    text = {**_LINEAR, "full_attention_interval": 3, **_EXPERTS, "shared_expert_intermediate_size": 32}
    model = _model("Qwen3_5Moe", tok, text, _LEARNED)
    return model, transformers.Qwen3VLProcessor(images(), tok, videos("Qwen3VL"))


def _omni(kind: str, tok: Any, text: dict[str, Any], vision: dict[str, Any], audio: dict[str, Any]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    small = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}
    index = "index" if kind == "Qwen2_5Omni" else "id"
    config = getattr(transformers, f"{kind}ThinkerConfig")(
        text_config={**sizes(tok), **text},
        vision_config=vision,
        audio_config={**small, "num_mel_bins": 16, "output_dim": HIDDEN, **audio},
        **{f"{name}_token_{index}": getattr(tok, f"{name}_token_id") for name in ("image", "video", "audio")},
        audio_start_token_id=tok.audio_bos_token_id,
        audio_end_token_id=tok.audio_eos_token_id,
        vision_start_token_id=tok.vision_bos_token_id,
        vision_end_token_id=tok.vision_eos_token_id,
    )
    sound = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    processor = getattr(transformers, f"{kind}Processor")(images(), videos(), sound, tok)
    return getattr(transformers, f"{kind}ThinkerForConditionalGeneration")(config), processor


def qwen2_5_omni() -> tuple[Any, Any]:
    """The thinker of Qwen2.5-Omni: images, video and sound."""
    wrappers = [f"{what}_{side}" for what in ("vision", "audio") for side in ("bos", "eos")]
    names = {f"{name}_token": f"<|{name}|>" for name in wrappers}
    tok = tokenizer(names | {f"{name}_token": f"<|{name.upper()}|>" for name in ("image", "video", "audio")}, [])
    rope = {**_ROPE, "mrope_section": [2, 1, 1]}
    return _omni("Qwen2_5Omni", tok, {"rope_parameters": rope}, _WINDOWS, {})


def qwen3_omni_moe() -> tuple[Any, Any]:
    """The thinker of Qwen3-Omni."""
    wrappers = {"bos": "start", "eos": "end"}
    names = {
        f"{what}_{side}_token": f"<|{what}_{wrappers[side]}|>" for what in ("vision", "audio") for side in wrappers
    }
    tok = tokenizer(names | {f"{name}_token": f"<|{name}_pad|>" for name in ("image", "video", "audio")}, [])
    rope = {**_ROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    vision = {**_LEARNED, "deepstack_visual_indexes": [0, 1]}
    return _omni("Qwen3OmniMoe", tok, {"rope_parameters": rope, **_EXPERTS}, vision, {"downsample_hidden_size": 8})


def qwen4_exp() -> tuple[Any, Any]:
    """Four residual streams, mixed before and after each block."""
    tok = _tokenizer()
    text = {**_LINEAR, "full_attention_interval": 3, **_EXPERTS, "shared_expert_intermediate_size": 32}
    index = {"n_heads": 4, "kv_heads": 1, "head_dim": 16, "budget": 16, "compress_ratio": 4}
    text |= {"hc_count": 4, "hc_lowrank": 8, **{f"indexer_{name}": value for name, value in index.items()}}
    model = _model("Qwen4Exp", tok, text, _LEARNED)
    return model, transformers.Qwen3VLProcessor(images(), tok, videos("Qwen3VL"))


FAMILIES = [
    Family("qwen2_vl", qwen2_vl, _PROMPT),
    Family("qwen2_5_vl", tiny_models.qwen2_5_vl, _PROMPT, short=True),
    Family("qwen2_5_vl (sliding window)", qwen2_5_vl_sliding, _PROMPT),
    Family("qwen3_vl", qwen3_vl, _PROMPT, short=True, note="vision features added between layers too"),
    Family("qwen3_vl_moe", qwen3_vl_moe, _PROMPT, note="vision features added between layers too"),
    Family("qwen3_5", qwen3_5, _PROMPT, short=True, note="linear attention"),
    Family("qwen3_5_moe", qwen3_5_moe, _PROMPT, note="linear attention"),
    Family("qwen2_5_omni_thinker", qwen2_5_omni, "<|vision_bos|><|IMAGE|><|vision_eos|>{text}"),
    Family("qwen3_omni_moe_thinker", qwen3_omni_moe, _PROMPT, note="vision features added between layers too"),
    Family("qwen4_exp", qwen4_exp, refused="residual streams"),
]
