# SPDX-License-Identifier: Apache-2.0
"""Readers of documents and charts."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    GotOcr2ImageProcessorPil,
    GotOcr2Processor,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PaddleOCRVLImageProcessorPil,
    PaddleOCRVLProcessor,
    PPChart2TableConfig,
    PPChart2TableImageProcessorPil,
    PPChart2TableProcessor,
    QianfanOCRConfig,
    QianfanOCRForConditionalGeneration,
    QianfanOCRProcessor,
)

from tests.families.registry import Family
from tests.tiny_models import TOWER, sizes, tokenizer

SQUARE = {"height": 32, "width": 32}
# A SAM-like tower of 8 x 8 patches, whose projector makes 2 x 2 of them.
SAM = {
    "hidden_size": 24,
    "output_channels": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "window_size": 3,
    "global_attn_indexes": [1],
    "mlp_dim": 48,
    "initializer_range": 0.1,
}
CHART_IMAGE = "<img>" + "<imgpad>" * 4 + "</img>"
CHART_TEMPLATE = f"""{{% for message in messages %}}<|im_start|>{{{{ message.role }}}}
{{% for part in message.content %}}{{% if part.type == "image" %}}{CHART_IMAGE}
{{% else %}}{{{{ part.text }}}}{{% endif %}}{{% endfor %}}<|im_end|>
{{% endfor %}}"""


def _got(kind: type) -> tuple[Any, Any]:
    torch.manual_seed(0)
    tok = tokenizer({}, ["<img>", "</img>", "<imgpad>", "<|im_start|>", "<|im_end|>"])
    text = {"model_type": "qwen2", **sizes(tok)}
    config = kind(text_config=text, vision_config=SAM, image_token_index=tok.convert_tokens_to_ids("<imgpad>"))
    return GotOcr2ForConditionalGeneration(config), tok


def got_ocr2() -> tuple[Any, Any]:
    """GOT-OCR2: a flat list of images, one a sample."""
    model, tok = _got(GotOcr2Config)
    processor = GotOcr2Processor(GotOcr2ImageProcessorPil(size=SQUARE), tok)
    processor.num_image_tokens = 4
    return model, processor


def pp_chart2table() -> tuple[Any, Any]:
    """PP-Chart2Table: GOT-OCR2 whose processor has no image token; the chat template writes all of them out."""
    model, tok = _got(PPChart2TableConfig)
    images = PPChart2TableImageProcessorPil(size=SQUARE)
    return model, PPChart2TableProcessor(images, tok, chat_template=CHART_TEMPLATE)


def qianfan_ocr() -> tuple[Any, Any]:
    """Qianfan-OCR: InternVL's tiles; the placeholder in a prompt is not the token in the sequence."""
    torch.manual_seed(0)
    special = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tok = tokenizer(special, [])
    config = QianfanOCRConfig(
        text_config={"model_type": "qwen3", "head_dim": 8, **sizes(tok)},
        vision_config={**TOWER, "drop_path_rate": 0.0},
        image_token_id=tok.context_image_token_id,
        image_seq_length=4,
    )
    images = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True)
    return QianfanOCRForConditionalGeneration(config), QianfanOCRProcessor(images, tok, image_seq_length=4)


def paddleocr_vl() -> tuple[Any, Any]:
    """PaddleOCR-VL: multimodal positions; the processor does not add the image's start and end."""
    torch.manual_seed(0)
    names = ["<|VIDEO_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>"]
    tok = tokenizer({"image_token": "<|IMAGE_PLACEHOLDER|>"}, names)
    video, start, end = tok.convert_tokens_to_ids(names)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = PaddleOCRVLConfig(
        text_config={**sizes(tok), "head_dim": 8, "rope_parameters": rope},
        vision_config={**TOWER, "num_hidden_layers": 2},
        image_token_id=tok.image_token_id,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    images = PaddleOCRVLImageProcessorPil(patch_size=8, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64})
    return PaddleOCRVLForConditionalGeneration(config), PaddleOCRVLProcessor(images, tok)


def _flat(processor: Any, images: Any, prompt: str) -> dict[str, Any]:
    return dict(processor(images=images, text=[prompt], return_tensors="pt"))


FAMILIES = [
    Family("got_ocr2", got_ocr2, "<img><imgpad></img>{text}", encode=_flat, note="a flat list of images"),
    Family("paddleocr_vl", paddleocr_vl, "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>{text}"),
    Family("pp_chart2table", pp_chart2table, CHART_IMAGE + "{text}"),
    Family("qianfan_ocr", qianfan_ocr, "<image>{text}", note="another placeholder in the prompt than in the sequence"),
]
