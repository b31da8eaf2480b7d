# SPDX-License-Identifier: Apache-2.0
"""Families of several makers with Qwen's kind of image: any size, merged patches, the markup in the prompt."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.families import qwen
from tests.families.registry import Family
from tests.tiny_models import HIDDEN, sizes, tokenizer

_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8}
_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
# Only the chat templates of some have the whole of an image's markup.
_TEMPLATE = (
    "{%% for message in messages %%}{{ message['role'] }}: {%% for part in message['content'] %%}"
    "{%% if part['type'] == 'image' %%}%s{%% else %%}{{ part['text'] }}{%% endif %%}{%% endfor %%}\n{%% endfor %%}"
)
_EXAONE, _KIMI, _DOTS = (
    "<vision><|image_pad|></vision>",
    "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>",
    "<|img|><|imgpad|><|endofimg|>",
)
_HUNYUAN = {
    f"image_{role}": f"<\uff5chy_place\u2581holder\u2581no\u2581{number}\uff5c>"
    for role, number in (("start_token", 100), ("token", 102), ("end_token", 101))
}


def ernie4_5_vl_moe() -> tuple[Any, Any]:
    """ERNIE 4.5 VL: other experts for image tokens than for text."""
    torch.manual_seed(0)
    names = ["image_start", "image_end", "video_start", "video_end"]
    special = {f"{name}_token": f"<|{name.upper()}|>" for name in names}
    special |= {"image_token": "<|IMAGE_PLACEHOLDER|>", "video_token": "<|VIDEO_PLACEHOLDER|>"}
    tok = tokenizer(special, [])
    text = {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}, "moe_num_experts": 4, "moe_k": 2}
    config = transformers.Ernie4_5_VLMoeConfig(
        text_config={**sizes(tok), **text, "moe_intermediate_size": [32, 16]},
        vision_config=_VISION,
        **{f"{name}_id": tok.convert_tokens_to_ids(token) for name, token in special.items()},
    )
    limits = {"patch_size": 8, "size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}}
    images = transformers.Ernie4_5_VLMoeImageProcessorPil(**limits)
    videos = transformers.Ernie4_5_VLMoeVideoProcessor(**limits, draw_on_frames=False)
    processor = transformers.Ernie4_5_VLMoeProcessor(images, tok, videos)
    return transformers.Ernie4_5_VLMoeForConditionalGeneration(config), processor


def exaone4_5() -> tuple[Any, Any]:
    """EXAONE 4.5: Qwen2.5-VL's tower with grouped heads."""
    torch.manual_seed(0)
    tok = tokenizer({}, ["<vision>", "</vision>", "<|image_pad|>", "<|video_pad|>"])
    vision = {**_VISION, "num_key_value_heads": 1, "out_hidden_size": HIDDEN, "window_size": 32}
    config = transformers.Exaone4_5_Config(
        text_config={"model_type": "exaone4", **sizes(tok), "sliding_window": 8, "sliding_window_pattern": 4},
        vision_config={**vision, "fullatt_block_indexes": [1]},
        image_token_id=tok.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tok.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tok.convert_tokens_to_ids("<vision>"),
        vision_end_token_id=tok.convert_tokens_to_ids("</vision>"),
    )
    processor = transformers.Exaone4_5_Processor(qwen.images(), tok, qwen.videos(), chat_template=_TEMPLATE % _EXAONE)
    return transformers.Exaone4_5_ForConditionalGeneration(config), processor


def kimi_k25() -> tuple[Any, Any]:
    """Kimi K2.5: a DeepSeek-V3 decoder."""
    torch.manual_seed(0)
    places = ["<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|media_pad|>"]
    tok = tokenizer({}, [*places, "<|kimi_k25_video_placeholder|>"])
    config = transformers.Kimi_K25Config(
        text_config={"model_type": "deepseek_v3", **sizes(tok), **_LATENT, **_EXPERTS, "n_group": 1, "topk_group": 1},
        vision_config={**_SMALL, "patch_size": 8, "pos_emb_height": 8, "pos_emb_width": 8},
        projection_hidden_size=32,
        image_token_id=tok.convert_tokens_to_ids("<|media_pad|>"),
        video_token_id=tok.convert_tokens_to_ids("<|kimi_k25_video_placeholder|>"),
        vision_start_token_id=tok.convert_tokens_to_ids("<|media_begin|>"),
        vision_end_token_id=tok.convert_tokens_to_ids("<|media_end|>"),
        tie_word_embeddings=False,
    )
    processor = transformers.Kimi_K25Processor(
        transformers.Kimi_K25ImageProcessor(patch_size=8),
        tok,
        transformers.Kimi_K25VideoProcessor(patch_size=8),
        chat_template=_TEMPLATE % _KIMI,
    )
    return transformers.Kimi_K25ForConditionalGeneration(config), processor


def dots3_note() -> tuple[Any, Any]:
    """dots3: images, video and sound, sparse attention."""
    torch.manual_seed(0)
    tok = tokenizer({}, ["<|img|>", "<|endofimg|>", "<|imgpad|>", "<|video_pad|>", "<|audio_comp_pad|>"])
    text = {**sizes(tok), **_LATENT, **_EXPERTS, "head_dim": 8, "shared_experts_intermediate_size": 32}
    sliding = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, **_LATENT}
    config = transformers.Dots3NoteConfig(
        text_config={
            **text,
            "index_topk": 16,
            "index_head_dim": 16,
            # Each position has a score above zero from some head, so none are tied.
            "index_n_heads": 16,
            "sliding_window": 16,
            **{f"swa_{name}": value for name, value in sliding.items()},
        },
        vision_config={
            **_SMALL,
            "patch_size": 8,
            "moe_intermediate_size": 16,
            "pyramid_num_routed": [-1, 2],
            "adapter_in_dim": 32,
            "adapter_out_dim": HIDDEN,
        },
        audio_config={**_SMALL, "downsample_hidden_size": 8, "adapter_input_size": 32, "adapter_out_dim": HIDDEN},
        image_token_id=tok.convert_tokens_to_ids("<|imgpad|>"),
        video_token_id=tok.convert_tokens_to_ids("<|video_pad|>"),
        audio_token_id=tok.convert_tokens_to_ids("<|audio_comp_pad|>"),
    )
    processor = transformers.Dots3NoteProcessor(
        qwen.images(temporal_patch_size=1),
        tok,
        qwen.videos("Qwen3VL", temporal_patch_size=1),
        transformers.Dots3NoteFeatureExtractor(),
        chat_template=_TEMPLATE % _DOTS,
    )
    return transformers.Dots3NoteForConditionalGeneration(config), processor


def hunyuan_vl() -> tuple[Any, Any]:
    """HunyuanOCR: newlines and two more tokens among the image's, positions on four axes."""
    torch.manual_seed(0)
    tok = tokenizer(_HUNYUAN, [])
    config = transformers.HunYuanVLConfig(
        text_config={**sizes(tok), "head_dim": 8, "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 1, 1]}},
        vision_config={**_SMALL, "patch_size": 8, "out_hidden_size": HIDDEN, "max_image_size": 64},
        image_token_id=tok.image_token_id,
        im_start_id=tok.image_start_token_id,
        im_end_id=tok.image_end_token_id,
    )
    images = transformers.HunYuanVLImageProcessorPil(patch_size=8, min_pixels=32 * 32, max_pixels=64 * 64)
    return transformers.HunYuanVLForConditionalGeneration(config), transformers.HunYuanVLProcessor(images, tok)


FAMILIES = [
    Family(
        "ernie4_5_vl_moe",
        ernie4_5_vl_moe,
        "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>{text}",
        note="experts for image tokens, the start and end tokens among them",
    ),
    Family("exaone4_5", exaone4_5, _EXAONE + "{text}"),
    Family("kimi_k25", kimi_k25, _KIMI + "{text}", note="the word image of the markup is in the chat template only"),
    Family("dots3_note", dots3_note, _DOTS + "{text}", note="the markup is in the chat template only"),
    Family(
        "hunyuan_vl",
        hunyuan_vl,
        "".join(_HUNYUAN.values()) + "{text}",
        alone=True,
        note="counts images through a batch, so that a sample's positions depend on those before it",
    ),
]
