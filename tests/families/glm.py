# SPDX-License-Identifier: Apache-2.0
"""GLM's families: images of any size in merged patches, begin and end tokens in the prompt."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.families.registry import Family
from tests.tiny_models import HIDDEN, sizes, tokenizer, without_video

_PROMPT = "<|begin_of_image|><|image|><|end_of_image|>{text}"
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "out_hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_EDGES = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64 * 4}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _tokenizer() -> Any:
    places = [f"<|{side}_of_{what}|>" for side in ("begin", "end") for what in ("image", "video")]
    return tokenizer({}, [*places, "<|image|>", "<|video|>"])


def _model(kind: str, tok: Any, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        text_config={**sizes(tok), "num_attention_heads": 2, "num_key_value_heads": 2, "rope_parameters": _ROPE}
        | (text or {}),
        vision_config=_VISION | (vision or {}),
        image_token_id=tok.convert_tokens_to_ids("<|image|>"),
        video_token_id=tok.convert_tokens_to_ids("<|video|>"),
        image_start_token_id=tok.convert_tokens_to_ids("<|begin_of_image|>"),
        image_end_token_id=tok.convert_tokens_to_ids("<|end_of_image|>"),
        video_start_token_id=tok.convert_tokens_to_ids("<|begin_of_video|>"),
        video_end_token_id=tok.convert_tokens_to_ids("<|end_of_video|>"),
    )
    return transformers.AutoModelForImageTextToText.from_config(config)


def _images(kind: str, limits: dict[str, Any] | None = None) -> Any:
    return getattr(transformers, f"{kind}ImageProcessorPil")(patch_size=8, **(limits or {"size": _EDGES}))


def _processor(processor: str, kind: str, tok: Any, limits: dict[str, Any] | None = None) -> Any:
    videos = getattr(transformers, f"{kind}VideoProcessor")(
        patch_size=8, max_image_size=_EDGES, **(limits or {"size": _EDGES})
    )
    return getattr(transformers, f"{processor}Processor")(_images(kind, limits), tok, videos)


def glm4v() -> tuple[Any, Any]:
    """GLM-4.1V."""
    tok = _tokenizer()
    return _model("Glm4v", tok), without_video(transformers.Glm4vProcessor)(_images("Glm4v"), tok)


def glm4v_moe() -> tuple[Any, Any]:
    """GLM-4.5V: experts behind the first layer."""
    tok = _tokenizer()
    return _model("Glm4vMoe", tok, {**_EXPERTS, "head_dim": 16}), _processor("Glm4v", "Glm4v", tok)


def glm46v() -> tuple[Any, Any]:
    """GLM-4.6V."""
    tok = _tokenizer()
    return _model("Glm46V", tok), _processor("Glm46V", "Glm46V", tok)


def glm_ocr() -> tuple[Any, Any]:
    """GLM-OCR."""
    tok = _tokenizer()
    return _model("GlmOcr", tok, {"head_dim": 16}), _processor("Glm46V", "Glm46V", tok)


def glmga() -> tuple[Any, Any]:
    """GLM-4.6V's class under another configuration."""
    tok = _tokenizer()
    return _model("Glmga", tok), _processor("Glm46V", "Glmga", tok)


def glm5_next() -> tuple[Any, Any]:
    """Four residual streams, and linear and sparse attention."""
    tok = _tokenizer()
    text = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, **_EXPERTS}
    index = {"index_topk": 16, "index_kpool": 1, "index_head_dim": 16, "index_n_heads": 16}
    linear = {"linear_head_dim": 16, "linear_num_heads": 2, "rope_parameters": None}
    layers = {
        "layer_types": ["linear_attention", "linear_attention", "indexed_attention"],
        "indexer_types": ["full"] * 3,
        "mlp_layer_types": ["dense", "dense", "sparse"],
    }
    model = _model("Glm5Next", tok, {**text, **index, **linear, **layers}, {"projection_intermediate_size": 48})
    return model, _processor("Glm5Next", "Glm5Next", tok, {"min_image_tokens": 4, "max_image_tokens": 16})


FAMILIES = [
    Family("glm4v", glm4v, _PROMPT, short=True),
    Family("glm4v_moe", glm4v_moe, _PROMPT),
    Family("glm46v", glm46v, _PROMPT),
    Family("glm_ocr", glm_ocr, _PROMPT),
    Family("glmga", glmga, _PROMPT),
    Family("glm5_next", glm5_next, refused="residual streams"),
]
