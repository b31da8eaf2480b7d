# SPDX-License-Identifier: Apache-2.0
"""Aria, Ovis2, Emu3, Janus, Inkling."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    AriaImageProcessorPil,
    AriaProcessor,
    Emu3Config,
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3Processor,
    Inkling2Config,
    Inkling2ForConditionalGeneration,
    Inkling2ImageProcessor,
    Inkling2Processor,
    InklingConfig,
    InklingFeatureExtractor,
    InklingForConditionalGeneration,
    InklingImageProcessor,
    InklingProcessor,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusImageProcessorPil,
    JanusProcessor,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Ovis2ImageProcessorPil,
    Ovis2Processor,
)

from tests.families.parts import ids
from tests.families.registry import Family
from tests.tiny_models import HIDDEN, TOWER, sizes, tokenizer


def aria() -> tuple[Any, Any]:
    """Aria: padded images, a projector with queries, experts."""
    torch.manual_seed(0)
    tok = tokenizer({"image_token": "<|img|>"}, [])
    config = AriaConfig(
        text_config={**sizes(tok), "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        vision_config={"model_type": "idefics3_vision", **TOWER, "image_size": 980, "patch_size": 140},
        projector_patch_to_query_dict={49: 8},
        **ids(tok, image_token_index="<|img|>"),
    )
    processor = AriaProcessor(AriaImageProcessorPil(), tok, size_conversion={980: 8})
    return AriaForConditionalGeneration(config), processor


def ovis2() -> tuple[Any, Any]:
    """Ovis2: a vocabulary of visual words, tiles with indicators that are embeddings of that vocabulary."""
    torch.manual_seed(0)
    indicators = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    tok = tokenizer({}, ["<image>", "<IMG_ATOM>", *indicators])
    config = Ovis2Config(
        text_config={"model_type": "qwen2", **sizes(tok)},
        vision_config={**TOWER, "hidden_stride": 2, "vocab_size": 64},
        vocab_size=len(tok),
        hidden_size=HIDDEN,
        visual_indicator_token_ids=tok.convert_tokens_to_ids(indicators),
        **ids(tok, image_token_id="<IMG_ATOM>"),
    )
    images = Ovis2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=4, crop_to_patches=True)
    return Ovis2ForConditionalGeneration(config), Ovis2Processor(images, tok, image_seq_length=4)


def emu3() -> tuple[Any, Any]:
    """Emu3: images in their own proportions as tokens of the vocabulary, with a token at the end of each line."""
    torch.manual_seed(0)
    marks = {
        "image_token": "<image>",
        "boi_token": "<|image start|>",
        "eoi_token": "<|image end|>",
        "image_wrapper_token": "<|image token|>",
        "eof_token": "<|extra_201|>",
    }
    tok = tokenizer(marks, ["<|extra_200|>", *(f"<|visual token {code:06d}|>" for code in range(16))])
    config = Emu3Config(
        text_config=sizes(tok),
        vq_config={
            "codebook_size": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1],
            "num_res_blocks": 1,
            "attn_resolutions": [3],
            "hidden_size": 32,
            "temporal_downsample_factor": 1,
        },
        vocabulary_map=tok.get_vocab(),
    )
    images = Emu3ImageProcessor(min_pixels=32 * 32, max_pixels=64 * 64)
    return Emu3ForConditionalGeneration(config), Emu3Processor(images, tok)


def janus() -> tuple[Any, Any]:
    """Janus: the path that reads images; the one that draws them is not measured."""
    torch.manual_seed(0)
    marks = {
        "image_token": "<image_placeholder>",
        "boi_token": "<begin_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tok = tokenizer(marks, [])
    config = JanusConfig(
        text_config={"model_type": "llama", **sizes(tok)},
        vision_config={**TOWER, "projection_dim": HIDDEN, "num_image_tokens": 16, "mlp_ratio": 2.0},
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 16,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": HIDDEN,
            "image_token_embed_dim": HIDDEN,
        },
        **ids(tok, image_token_id="<image_placeholder>"),
    )
    images = JanusImageProcessorPil(size={"height": 32, "width": 32})
    return JanusForConditionalGeneration(config), JanusProcessor(images, tok, num_image_tokens=16)


# Each part of a message is a message of its own.
_INKLING_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "<|message_{{ 'user' if message.role == 'user' else 'model' }}|>"
    "{{ '<|content_image|><|unused_200054|>' if part.type == 'image' else '<|content_text|>' + part.text }}"
    "<|end_message|>{% endfor %}{% endfor %}"
)


def inkling() -> tuple[Any, Any]:
    """Inkling: patches of 40 pixels, relative positions, experts, convolutions in the decoder."""
    torch.manual_seed(0)
    marks = ["<|content_image|>", "<|unused_200054|>", "<|content_audio_input|>", "<|unused_200053|>"]
    tok = tokenizer({}, [*marks, "<|message_user|>", "<|message_model|>", "<|content_text|>", "<|end_message|>"])
    config = InklingConfig(
        text_config={
            **{field: value for field, value in sizes(tok).items() if field != "intermediate_size"},
            "head_dim": 8,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "sliding_window_size": 8,
            "d_rel": 4,
            "rel_extent": 16,
            "local_layer_ids": [0, 1],
            "intermediate_size": 64,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
        },
        vision_config={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        audio_config={"n_mel_bins": 8, "mel_vocab_size": 16},
        **ids(tok, image_token_id="<|unused_200054|>", image_bos_token_id="<|content_image|>"),
        **ids(tok, audio_token_id="<|unused_200053|>", audio_bos_token_id="<|content_audio_input|>"),
    )
    parts = InklingFeatureExtractor(), InklingImageProcessor(), tok
    processor = InklingProcessor(*parts, chat_template=_INKLING_TEMPLATE)
    return InklingForConditionalGeneration(config), processor


def inkling2() -> tuple[Any, Any]:
    """Inkling 2: dynamic resolution, layers that read the sums of earlier blocks."""
    torch.manual_seed(0)
    tok = tokenizer({}, ["<|content_image|>", "<|unused_200054|>"])
    config = Inkling2Config(
        text_config={
            **{field: value for field, value in sizes(tok).items() if field != "intermediate_size"},
            "unpadded_vocab_size": len(tok),
            "head_dim": 8,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "sliding_window_size": 8,
            "d_rel": 4,
            "rel_extent": 16,
            "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"],
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_layers_per_attn_res_block": 2,
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "posemb_grid_size": 4,
            "projection_hidden_dim": 48,
            "text_hidden_size": HIDDEN,
        },
        **ids(tok, image_token_id="<|unused_200054|>"),
    )
    return Inkling2ForConditionalGeneration(config), Inkling2Processor(Inkling2ImageProcessor(), tok)


FAMILIES = [
    Family("aria", aria, "<|img|>{text}"),
    Family("ovis2", ovis2, "<image>{text}"),
    Family("emu3", emu3, "<image>{text}", alone=True, note="an image's codes depend on the largest in its batch"),
    Family("janus", janus, "<image_placeholder>{text}"),
    Family("inkling_mm_model", inkling, "<|content_image|><|unused_200054|>{text}"),
    Family("inkling2", inkling2, "<|unused_200054|>{text}"),
]
