# SPDX-License-Identifier: Apache-2.0
"""Models of Meta."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonImageProcessorPil,
    ChameleonProcessor,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Llama4ImageProcessor,
    Llama4Processor,
    LlamaConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessorPil,
    MllamaProcessor,
    MuseGlimmerConfig,
    MuseGlimmerForConditionalGeneration,
    MuseGlimmerImageProcessor,
    MuseGlimmerProcessor,
    MuseGlimmerVideoProcessor,
    MuseSparkConfig,
    MuseSparkFeatureExtractor,
    MuseSparkForConditionalGeneration,
    MuseSparkProcessor,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    PerceptionLMImageProcessor,
    PerceptionLMProcessor,
    PerceptionLMVideoProcessor,
    TimmWrapperConfig,
)

from tests.families.parts import ids
from tests.families.registry import Family
from tests.tiny_models import HIDDEN, TOWER, sizes, tokenizer


def llama4() -> tuple[Any, Any]:
    """Llama 4: tiles with separators and a thumbnail, experts, attention in chunks."""
    torch.manual_seed(0)
    marks = ["<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>"]
    tok = tokenizer({}, ["<|image|>", *marks])
    config = Llama4Config(
        text_config={
            **sizes(tok),
            "head_dim": 8,
            "intermediate_size_mlp": 64,
            "num_local_experts": 2,
            "attention_chunk_size": 16,
            "no_rope_layers": [1, 1, 0],
        },
        vision_config={
            **TOWER,
            "intermediate_size": 96,
            "vision_output_dim": 24,
            "projector_input_dim": 24,
            "projector_output_dim": 24,
        },
        **ids(tok, image_token_index="<|patch|>", boi_token_index="<|image_start|>", eoi_token_index="<|image_end|>"),
    )
    images = Llama4ImageProcessor(size={"height": 32, "width": 32}, max_patches=4)
    return Llama4ForConditionalGeneration(config), Llama4Processor(images, tok, patch_size=8)


def chameleon() -> tuple[Any, Any]:
    """Chameleon: images as tokens of the vocabulary."""
    torch.manual_seed(0)
    codes = [f"IMGIMG{'ABCDEFGHIJ'[code // 10]}{'ABCDEFGHIJ'[code % 10]}Z" for code in range(16)]
    tok = tokenizer({}, ["<image>", "<racm3:break>", "<eoss>", "<reserved08706>", *codes])
    tok.sep_token = "<reserved08706>"
    config = ChameleonConfig(
        **sizes(tok),
        vocabulary_map=tok.get_vocab(),
        vq_config={
            "embed_dim": 8,
            "latent_channels": 8,
            "num_embeddings": 16,
            "resolution": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
        },
    )
    images = ChameleonImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return ChameleonForConditionalGeneration(config), ChameleonProcessor(images, tok, image_seq_length=16)


def perception_lm() -> tuple[Any, Any]:
    """Perception LM: tiles and a thumbnail, a tower of timm."""
    torch.manual_seed(0)
    tok = tokenizer({"image_token": "<|image|>", "video_token": "<|video|>"}, [])
    tower = TimmWrapperConfig(
        architecture="vit_pe_core_large_patch14_336",
        model_args={
            "embed_dim": 32,
            "img_size": [48, 48],
            "patch_size": 12,
            "depth": 2,
            "num_heads": 2,
            "global_pool": "",
            "use_post_transformer_norm": False,
            "init_values": 0.1,
            "ref_feat_shape": [4, 4],
        },
    )
    config = PerceptionLMConfig(
        text_config=LlamaConfig(**sizes(tok)),
        vision_config=tower,
        projector_pooling_ratio=2,
        **ids(tok, image_token_id="<|image|>", video_token_id="<|video|>"),
    )
    images = PerceptionLMImageProcessor(tile_size=48, max_num_tiles=3)
    videos = PerceptionLMVideoProcessor(size={"height": 48, "width": 48})
    processor = PerceptionLMProcessor(videos, images, tok, patch_size=12, pooling_ratio=2)
    return PerceptionLMForConditionalGeneration(config), processor


def mllama() -> tuple[Any, Any]:
    """Llama 3.2 Vision: layers that attend to the image."""
    torch.manual_seed(0)
    tok = tokenizer({}, ["<|python_tag|>"])
    text = sizes(tok)
    tok.add_tokens(["<|image|>"], special_tokens=True)  # its id is the first one beyond the vocabulary
    config = MllamaConfig(
        text_config={**text, "cross_attention_layers": [1]},
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 48,
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            "max_num_tiles": 2,
        },
        **ids(tok, image_token_index="<|image|>"),
    )
    images = MllamaImageProcessorPil(size={"height": 32, "width": 32}, max_image_tiles=2)
    return MllamaForConditionalGeneration(config), MllamaProcessor(images, tok)


_MUSE_MARKS = (
    "<|patch|> <|image_start|> <|image_end|> <|video|> <|vid_frame_separator|> <|vid_start|> <|vid_end|> <|audio|> "
    "<|soft_audio_start|> <|soft_audio_end|>"
).split()
_MUSE_TOWER = {
    "patch_size": 8,
    "pos_emb_height": 8,
    "pos_emb_width": 8,
    "max_position_embeddings": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
}


def _muse_videos() -> Any:
    return MuseGlimmerVideoProcessor(patch_size=8)


def muse_glimmer() -> tuple[Any, Any]:
    """Muse Glimmer: dynamic resolution, sliding windows."""
    torch.manual_seed(0)
    tok = tokenizer({}, _MUSE_MARKS)
    config = MuseGlimmerConfig(
        text_config={**sizes(tok), "head_dim": 8, "sliding_window": 16},
        vision_config=_MUSE_TOWER,
        out_hidden_size=128,
        projector_hidden_size=48,
        **ids(tok, image_token_id="<|patch|>", video_token_id="<|video|>"),
    )
    images = MuseGlimmerImageProcessor(patch_size=8, max_image_tokens=16)
    return MuseGlimmerForConditionalGeneration(config), MuseGlimmerProcessor(images, _muse_videos(), tok)


def muse_spark() -> tuple[Any, Any]:
    """Muse Spark: as Muse Glimmer, with experts."""
    torch.manual_seed(0)
    tok = tokenizer({}, _MUSE_MARKS)
    text = {"head_dim": 8, "sliding_window": 16, "moe_intermediate_size": 32, "num_local_experts": 4}
    config = MuseSparkConfig(
        text_config={**sizes(tok), **text, "num_experts_per_tok": 2, "moe_hidden_size": 32},
        vision_config=_MUSE_TOWER,
        audio_config={
            "hidden_sizes": [8, 8, 8, 8],
            "depths": [1, 1, 1, 1],
            "out_hidden_size": HIDDEN,
        },
        out_hidden_size=128,
        projector_hidden_size=48,
        **ids(tok, image_token_id="<|patch|>", video_token_id="<|video|>", audio_token_id="<|audio|>"),
    )
    images = MuseGlimmerImageProcessor(patch_size=8, max_image_tokens=16)
    processor = MuseSparkProcessor(images, _muse_videos(), tok, MuseSparkFeatureExtractor())
    return MuseSparkForConditionalGeneration(config), processor


def _in_float32(processor: Any, images: Any, prompt: str) -> dict[str, Any]:
    inputs = processor(images=[images], text=[prompt], return_tensors="pt")
    return {**inputs, "pixel_values": inputs["pixel_values"].float()}


FAMILIES = [
    Family("llama4", llama4, "<|image|>{text}", encode=_in_float32),
    Family("chameleon", chameleon, "<image>{text}", short=True),
    Family(
        "perception_lm",
        perception_lm,
        "<|image|>{text}",
        alone=True,
        one_image="failed on the probe samples",
        note="no batch of different tile counts",
    ),
    Family("mllama", mllama, refused="cross-attention"),
    Family("muse_glimmer", muse_glimmer, "<|patch|>{text}"),
    Family("muse_spark", muse_spark, "<|patch|>{text}"),
]
