# SPDX-License-Identifier: Apache-2.0
"""Mistral's fourth generation."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Mistral4Config,
    Mistral4ForCausalLM,
    MistralLarge4Config,
    MistralLarge4ForConditionalGeneration,
    PixtralImageProcessorPil,
    PixtralProcessor,
)

from tests.families.parts import ids
from tests.families.registry import Family
from tests.tiny_models import TOWER, sizes, tokenizer

_EXPERTS = {
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def _processor(tok: Any) -> Any:
    images = PixtralImageProcessorPil(patch_size={"height": 8, "width": 8}, size={"longest_edge": 64})
    return PixtralProcessor(images, tok, patch_size=8, spatial_merge_size=2)


def mistral_large4() -> tuple[Any, Any]:
    """Mistral Large 4: images in their own proportions, sparse attention, experts."""
    torch.manual_seed(0)
    tok = tokenizer({}, ["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    text = {field: value for field, value in _EXPERTS.items() if field != "q_lora_rank"}
    config = MistralLarge4Config(
        text_config={
            **sizes(tok),
            **text,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "no_rope_layers": [1, 1, 0],
        },
        vision_config={"model_type": "pixtral", **TOWER, "image_size": 64},
        **ids(tok, image_token_index="[IMG]"),
    )
    return MistralLarge4ForConditionalGeneration(config), _processor(tok)


def mistral4() -> tuple[Any, Any]:
    """Mistral Small 4's decoder, which the mapping lists: it reads text only."""
    torch.manual_seed(0)
    tok = tokenizer({}, ["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    return Mistral4ForCausalLM(Mistral4Config(**sizes(tok), **_EXPERTS)), _processor(tok)


FAMILIES = [
    Family("mistral_large4", mistral_large4, "[IMG]{text}", note="attends to all tokens up to 2048, then to some"),
    Family("mistral4", mistral4, refused="no vision tokens", note="reads text only"),
]
