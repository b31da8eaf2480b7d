# SPDX-License-Identifier: Apache-2.0
"""InternVL."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GotOcr2ImageProcessorPil, InternVLConfig, InternVLForConditionalGeneration, InternVLProcessor

from tests.families.parts import TOWER, ids, sizes, tokenizer, without_video
from tests.families.registry import Family


def internvl() -> tuple[Any, Any]:
    """InternVL: tiles and a thumbnail, merged patches."""
    torch.manual_seed(0)
    marks = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tok = tokenizer({**marks, "video_token": "<video>"}, [])
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **sizes(tok)},
        vision_config=TOWER,
        image_seq_length=4,
        **ids(tok, image_token_id="<IMG_CONTEXT>"),
    )
    images = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=4)
    processor = without_video(InternVLProcessor)(images, tok, None, image_seq_length=4)
    return InternVLForConditionalGeneration(config), processor


FAMILIES = [
    Family("internvl", internvl, "<IMG_CONTEXT>{text}", short=True),
]
