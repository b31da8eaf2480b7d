# SPDX-License-Identifier: Apache-2.0
"""Tiny random-weight vision-language models with their own processors, built from configuration, nothing downloaded."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    SiglipImageProcessorPil,
)

HIDDEN = 32
LAYERS = 3
# A vision tower of 4 x 4 patches, as CLIP's and SigLIP's configurations name its sizes.
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_WORDS = (
    "the model reads an image and then a text about something else entirely while the vision tokens and the text "
    "tokens drift apart or come together layer by layer as training goes on and nobody looks at the loss alone "
)


def without_video(kind: type) -> Any:
    """A real processor class without its video part, which would need torchvision."""

    def check(self: Any, name: str, argument: Any) -> Any:
        return None if name == "video_processor" else kind.check_argument_for_proper_class(self, name, argument)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})


def tokenizer(special: dict[str, str], extra: list[str]) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer, trained on the spot."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    names = ["<pad>", "<s>", "</s>", *special.values(), *extra]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(dict.fromkeys(names)),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([_WORDS] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=special or None
    )


def llava(dropout: float = 0.0, seed: int = 0, layers: int = LAYERS, hidden: int = HIDDEN) -> tuple[Any, Any]:
    """LLaVA: CLIP tower of 4 x 4 patches, MLP projector, Llama."""
    torch.manual_seed(seed)
    tok = tokenizer({"image_token": "<image>"}, [])
    vision = CLIPVisionConfig(**TOWER)
    decoder = {**sizes(tok), "num_hidden_layers": layers, "hidden_size": hidden}
    text = LlamaConfig(**decoder, attention_dropout=dropout)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        images, tok, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return LlavaForConditionalGeneration(config), processor


def qwen2_5_vl(seed: int = 0) -> tuple[Any, Any]:
    """Qwen2.5-VL: dynamic resolution, merged patches, wrapper tokens around the image, multimodal positions."""
    torch.manual_seed(seed)
    special = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    tok = tokenizer(special, ["<|vision_start|>", "<|vision_end|>"])
    config = Qwen2_5_VLConfig(
        text_config={
            **sizes(tok),
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
            "patch_size": 8,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=tok.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tok.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tok.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tok.convert_tokens_to_ids("<|vision_end|>"),
    )
    images = Qwen2VLImageProcessorPil(patch_size=8, min_pixels=32 * 32, max_pixels=64 * 64)
    return Qwen2_5_VLForConditionalGeneration(config), without_video(Qwen2_5_VLProcessor)(images, tok)


def idefics3(seed: int = 0) -> tuple[Any, Any]:
    """Idefics3: text decoder under another name, connector that merges patches, wrapper tokens as text."""
    torch.manual_seed(seed)
    special = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    tok = tokenizer(special, [])
    config = Idefics3Config(
        text_config={"model_type": "llama", **sizes(tok)},
        vision_config=TOWER,
        image_token_id=tok.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 32})
    return Idefics3ForConditionalGeneration(config), Idefics3Processor(images, tok, image_seq_len=4)


def paligemma(seed: int = 0) -> tuple[Any, Any]:
    """PaliGemma: image first, bidirectional prefix, scaled embeddings."""
    torch.manual_seed(seed)
    tok = tokenizer({"image_token": "<image>"}, [])
    config = PaliGemmaConfig(
        text_config={"model_type": "gemma", "head_dim": 8, **sizes(tok)},
        vision_config={"model_type": "siglip_vision_model", **TOWER},
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        projection_dim=HIDDEN,
    )
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    return PaliGemmaForConditionalGeneration(config), PaliGemmaProcessor(images, tok)


def sizes(tok: PreTrainedTokenizerFast) -> dict[str, int]:
    """Sizes of a decoder for a tokenizer, as its configuration names them."""
    return {
        "vocab_size": len(tok),
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": tok.pad_token_id,
        "bos_token_id": tok.bos_token_id,
        "eos_token_id": tok.eos_token_id,
    }
