# SPDX-License-Identifier: Apache-2.0
"""Families with Pixtral's tower: images of any size, the break after each row of patches as text."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch
import transformers
from transformers.models.pixtral import image_processing_pil_pixtral

from tests.families.registry import Family
from tests.tiny_models import sizes, tokenizer

_TOWER = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 8,
}


def _processor(tok: Any, merge: int) -> Any:
    if importlib.util.find_spec("torchvision") is None:
        # The processor asks for torchvision only to import a function that the module for Pillow has too.
        module = "transformers.models.pixtral.image_processing_pixtral"
        sys.modules.setdefault(module, image_processing_pil_pixtral)
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    images = transformers.PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 8, "width": 8})
    return PixtralProcessor(images, tok, patch_size=8, spatial_merge_size=merge)


def llava_pixtral() -> tuple[Any, Any]:
    """LLaVA's class as Pixtral-12B has it."""
    torch.manual_seed(0)
    tok = tokenizer({}, ["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    config = transformers.LlavaConfig(
        vision_config=_TOWER,
        text_config={"model_type": "mistral", "head_dim": 8, **sizes(tok)},
        image_token_index=tok.convert_tokens_to_ids("[IMG]"),
        image_seq_length=1,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return transformers.LlavaForConditionalGeneration(config), _processor(tok, merge=1)


def mistral3() -> tuple[Any, Any]:
    """Patches merged by two."""
    torch.manual_seed(0)
    tok = tokenizer({}, ["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    config = transformers.Mistral3Config(
        vision_config=_TOWER,
        text_config={"model_type": "mistral", "head_dim": 8, **sizes(tok)},
        image_token_index=tok.convert_tokens_to_ids("[IMG]"),
    )
    return transformers.Mistral3ForConditionalGeneration(config), _processor(tok, merge=2)


def lighton_ocr() -> tuple[Any, Any]:
    """A Qwen3 decoder, without tokens between the rows."""
    torch.manual_seed(0)
    names = {"image_token": "<|image_pad|>", "image_break_token": "<|vision_pad|>", "image_end_token": "<|vision_end|>"}
    tok = tokenizer(names, [])
    config = transformers.LightOnOcrConfig(
        vision_config=_TOWER,
        text_config={"model_type": "qwen3", "head_dim": 8, **sizes(tok)},
        image_token_id=tok.image_token_id,
    )
    images = transformers.PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 16, "width": 16})
    processor = transformers.LightOnOcrProcessor(images, tok, patch_size=8, spatial_merge_size=2)
    return transformers.LightOnOcrForConditionalGeneration(config), processor


FAMILIES = [
    Family("llava (pixtral)", llava_pixtral, "[IMG]{text}", note="the breaks between rows count as neither"),
    Family("mistral3", mistral3, "[IMG]{text}", short=True, note="the breaks between rows count as neither"),
    Family("lighton_ocr", lighton_ocr, "<|image_pad|>{text}"),
]
