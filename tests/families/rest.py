# SPDX-License-Identifier: Apache-2.0
"""Families of makers with one or two models each."""

from __future__ import annotations

import string
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import (
    FuyuConfig,
    FuyuForCausalLM,
    FuyuImageProcessor,
    FuyuProcessor,
    HyperCLOVAXVisionV2Config,
    HyperCLOVAXVisionV2ForConditionalGeneration,
    HyperCLOVAXVisionV2Processor,
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLConfig,
    MiniMaxM3VLImageProcessor,
    MiniMaxM3VLProcessor,
    MiniMaxM3VLVideoProcessor,
    Molmo2Config,
    Molmo2ForConditionalGeneration,
    Molmo2ImageProcessor,
    Molmo2Processor,
    Molmo2VideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessorPil,
    Qwen2VLVideoProcessor,
    Step3p7Config,
    Step3p7ForConditionalGeneration,
    Step3p7ImageProcessor,
    Step3p7Processor,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
    VideoLlama3ImageProcessorPil,
    VideoLlama3Processor,
    VideoLlama3VideoProcessor,
)

from tests.families.parts import PLACED
from tests.families.registry import Family
from tests.tiny_models import HIDDEN, TOWER, sizes, tokenizer

PIXELS = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
SQUARE = {"height": 32, "width": 32}
HYPERCLOVA_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% for part in message.content %}{% if part.type == "image" %}<|image_start|><|IMAGE_PAD|><|image_end|>
{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}"""


def fuyu() -> tuple[Any, Any]:
    """Fuyu: patches without a tower, a newline token after each row; the processor places the image."""
    torch.manual_seed(0)
    # As Llama's: the processor drops the piece that begins each text. Its image tokens are ordinary pieces.
    pieces = ["|SPEAKER|", "|NEWLINE|", "<0x04>", "\u2581", *string.printable]
    vocab = [(piece, -1.0) for piece in ("<pad>", "<s>", "</s>", *dict.fromkeys(pieces))]
    raw = Tokenizer(models.Unigram(vocab, unk_id=0))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tok = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    text = {"model_type": "persimmon", **sizes(tok)}
    image_id = tok.convert_tokens_to_ids("|SPEAKER|")
    config = FuyuConfig(text_config=text, image_size=64, patch_size=16, image_token_id=image_id)
    images = FuyuImageProcessor(size={"height": 64, "width": 64}, patch_size={"height": 16, "width": 16})
    return FuyuForCausalLM(config), FuyuProcessor(images, tok)


def hyperclovax_vision_v2() -> tuple[Any, Any]:
    """HyperCLOVA X: Qwen2.5-VL's tower; only the chat template has the image's start and end."""
    torch.manual_seed(0)
    special = {"image_token": "<|IMAGE_PAD|>", "video_token": "<|VIDEO_PAD|>"}
    tok = tokenizer(special, ["<|image_start|>", "<|image_end|>", "<|im_start|>", "<|im_end|>"])
    vision = {
        "depth": 2,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "patch_size": 8,
        "window_size": 32,
        "fullatt_block_indexes": [1],
    }
    config = HyperCLOVAXVisionV2Config(
        text_config={"model_type": "hyperclovax", **sizes(tok)},
        vision_config=vision,
        image_token_id=tok.image_token_id,
        video_token_id=tok.video_token_id,
    )
    images, videos = (kind(patch_size=8, size=PIXELS) for kind in (Qwen2VLImageProcessorPil, Qwen2VLVideoProcessor))
    processor = HyperCLOVAXVisionV2Processor(images, tok, videos, chat_template=HYPERCLOVA_TEMPLATE)
    return HyperCLOVAXVisionV2ForConditionalGeneration(config), processor


def minimax_m3_vl() -> tuple[Any, Any]:
    """MiniMax M3: sparse attention over blocks of keys, and experts."""
    torch.manual_seed(0)
    names = ["]<]image[>[", "]<]video[>[", "]<]start of image[>[", "]<]end of image[>["]
    tok = tokenizer({}, names)
    text = {
        **sizes(tok),
        "head_dim": 8,
        "rotary_dim": 4,
        "dense_intermediate_size": 64,
        "shared_intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_block_size": 4,
        "index_topk_blocks": 16,
    }
    vision = {**TOWER, "hidden_size": 32, "num_hidden_layers": 2, "image_size": 64}
    config = MiniMaxM3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tok.convert_tokens_to_ids(names[0]),
        video_token_index=tok.convert_tokens_to_ids(names[1]),
        projector_hidden_size=48,
    )
    images, videos = MiniMaxM3VLImageProcessor(patch_size=8, size=PIXELS), MiniMaxM3VLVideoProcessor(patch_size=8)
    return MiniMaxM3SparseForConditionalGeneration(config), MiniMaxM3VLProcessor(images, tok, videos)


def molmo2() -> tuple[Any, Any]:
    """Molmo2: a low and a high resolution view, pooled, with a token after each row; its processor adds <s>."""
    torch.manual_seed(0)
    names = ["<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<frame_start>"]
    names += ["<im_end>", "<frame_end>", "<im_low>"]
    tok = tokenizer({"image_token": "<|image|>", "video_token": "<|video|>"}, names)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12}
    tower = {"hidden_size": 24, "intermediate_size": 48, "initializer_range": 0.1, **heads}
    adapter = {**tower, "text_hidden_size": HIDDEN, "vision_feature_layer": [1, 0]}
    ids = {name: tok.convert_tokens_to_ids(f"<{token}>") for name, token in MOLMO_IDS.items()}
    config = Molmo2Config(
        text_config={**sizes(tok), "head_dim": 8, "additional_vocab_size": 8},
        vision_config={**tower, "num_hidden_layers": 2, "image_size": [32, 32], "patch_size": 8},
        adapter_config=adapter,
        **ids,
    )
    images = Molmo2ImageProcessor(size=SQUARE, patch_size=8, overlap_margins=[1, 1], max_crops=4)
    videos = Molmo2VideoProcessor(size=SQUARE, patch_size=8)
    return Molmo2ForConditionalGeneration(config), Molmo2Processor(images, videos, tok)


MOLMO_IDS = {
    "image_start_token_id": "im_start",
    "low_res_image_start_token_id": "low_res_im_start",
    "image_end_token_id": "im_end",
    "image_patch_id": "im_patch",
    "frame_start_token_id": "frame_start",
    "frame_end_token_id": "frame_end",
}


def step3p7() -> tuple[Any, Any]:
    """Step 3.7: local crops before the whole image, each between markers, and layers with unlike numbers of heads."""
    torch.manual_seed(0)
    tok = tokenizer({}, ["<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>"])
    text = {
        **sizes(tok),
        "head_dim": 8,
        "sliding_window": 8,
        "num_sliding_attention_heads": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "share_expert_dim": 32,
    }
    vision = {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_ratio": 2.0,
        "image_size": 32,
        "patch_size": 4,
        "max_position_embeddings": 64,
    }
    image_id = tok.convert_tokens_to_ids("<im_patch>")
    config = Step3p7Config(text_config=text, vision_config=vision, image_token_id=image_id)
    images = Step3p7ImageProcessor(size=SQUARE, patch_size=16, vision_patch_size=4)
    return Step3p7ForConditionalGeneration(config), Step3p7Processor(images, tok)


def video_llama_3() -> tuple[Any, Any]:
    """VideoLLaMA3."""
    torch.manual_seed(0)
    tok = tokenizer({"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}, [])
    config = VideoLlama3Config(
        text_config={"model_type": "qwen2", **sizes(tok)},
        vision_config={key: value for key, value in TOWER.items() if key != "image_size"},
        image_token_id=tok.image_token_id,
        video_token_id=tok.video_token_id,
    )
    kinds = (VideoLlama3ImageProcessorPil, VideoLlama3VideoProcessor)
    images, videos = (kind(patch_size=8, size=PIXELS) for kind in kinds)
    return VideoLlama3ForConditionalGeneration(config), VideoLlama3Processor(images, tok, videos)


FAMILIES = [
    Family("fuyu", fuyu, "{text}", **PLACED),
    Family("hyperclovax_vision_v2", hyperclovax_vision_v2, "<|image_start|><|IMAGE_PAD|><|image_end|>{text}"),
    Family("minimax_m3_vl", minimax_m3_vl, "]<]image[>[{text}"),
    Family("molmo2", molmo2, "<|image|>{text}"),
    Family("step3p7", step3p7, "<im_patch>{text}"),
    Family("video_llama_3", video_llama_3, "<|image_pad|>{text}"),
]
