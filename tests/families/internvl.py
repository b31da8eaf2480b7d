# SPDX-License-Identifier: Apache-2.0
"""InternVL."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import (
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
)

from tests.families.parts import ids
from tests.families.registry import Family
from tests.tiny_models import TOWER, sizes, tokenizer, without_video


def internvl(*, videos: bool = False) -> tuple[Any, Any]:
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
    size = {"height": 32, "width": 32}
    images = GotOcr2ImageProcessorPil(size=size, max_patches=4)
    if videos:
        processor = InternVLProcessor(images, tok, InternVLVideoProcessor(size=size), image_seq_length=4)
    else:
        processor = without_video(InternVLProcessor)(images, tok, None, image_seq_length=4)
    return InternVLForConditionalGeneration(config), processor


FAMILIES = [
    Family("internvl", internvl, "<IMG_CONTEXT>{text}", short=True),
    Family("internvl (video)", partial(internvl, videos=True), "<IMG_CONTEXT>{text}"),
]
