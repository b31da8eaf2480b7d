# SPDX-License-Identifier: Apache-2.0
"""Idefics and SmolVLM."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics2ImageProcessorPil,
    Idefics2Processor,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessorPil,
    IdeficsProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
    SmolVLMProcessor,
)

from tests import tiny_models
from tests.families.parts import ids
from tests.families.registry import Family
from tests.tiny_models import HIDDEN, TOWER, sizes, tokenizer, without_video

_MARKS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}


def idefics() -> tuple[Any, Any]:
    """IDEFICS: layers between those of the decoder attend to the image."""
    torch.manual_seed(0)
    tok = tokenizer({"image_token": "<image>"}, ["<fake_token_around_image>"])
    config = IdeficsConfig(
        **{field: value for field, value in sizes(tok).items() if field != "num_key_value_heads"},
        vision_config={"embed_dim": 24, **{field: value for field, value in TOWER.items() if field != "hidden_size"}},
    )
    images = IdeficsImageProcessorPil(image_size=32)
    return IdeficsForVisionText2Text(config), IdeficsProcessor(images, tok, image_size=32)


def idefics2() -> tuple[Any, Any]:
    """Idefics2: a resampler, images in their own proportions."""
    torch.manual_seed(0)
    tok = tokenizer({}, ["<fake_token_around_image>", "<image>", "<end_of_utterance>"])
    config = Idefics2Config(
        text_config={"model_type": "mistral", **sizes(tok)},
        vision_config=TOWER,
        perceiver_config={
            "hidden_size": HIDDEN,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        },
        **ids(tok, image_token_id="<image>"),
    )
    images = Idefics2ImageProcessorPil(size={"shortest_edge": 24, "longest_edge": 32})
    return Idefics2ForConditionalGeneration(config), Idefics2Processor(images, tok, image_seq_len=4)


def smolvlm() -> tuple[Any, Any]:
    """SmolVLM: as Idefics3, an image in tiles with their row and column, and whole."""
    torch.manual_seed(0)
    places = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    tok = tokenizer({**_MARKS, "video_token": "<video>"}, places)
    config = SmolVLMConfig(
        text_config={"model_type": "llama", **sizes(tok)}, vision_config=TOWER, **ids(tok, image_token_id="<image>")
    )
    images = SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = without_video(SmolVLMProcessor)(images, tok, None, image_seq_len=4)
    return SmolVLMForConditionalGeneration(config), processor


FAMILIES = [
    Family("idefics", idefics, refused="cross-attention"),
    Family("idefics2", idefics2, "<image>{text}"),
    Family("idefics3", tiny_models.idefics3, "<image>{text}"),
    Family("smolvlm", smolvlm, "<image>{text}", short=True),
]
