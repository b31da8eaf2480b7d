# SPDX-License-Identifier: Apache-2.0
"""Microsoft's: Kosmos, Phi-4-multimodal, and the captioners and document models that have no image in the sequence."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BartConfig,
    CLIPImageProcessorPil,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    Kosmos2_5Config,
    Kosmos2_5ForConditionalGeneration,
    Kosmos2_5ImageProcessorPil,
    Kosmos2_5Processor,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    Kosmos2Processor,
    LayoutLMv3ImageProcessorPil,
    Phi4MultimodalConfig,
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalForCausalLM,
    Phi4MultimodalImageProcessor,
    Phi4MultimodalProcessor,
    UdopConfig,
    UdopForConditionalGeneration,
    UdopProcessor,
)

from tests.families.parts import PLACED
from tests.families.registry import Family
from tests.tiny_models import HIDDEN, LAYERS, TOWER, sizes, tokenizer


def _clip() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def _kosmos_text(tok: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tok),
        "embed_dim": HIDDEN,
        "layers": LAYERS,
        "ffn_dim": 64,
        "attention_heads": 4,
        "pad_token_id": tok.pad_token_id,
        "max_position_embeddings": 512,
    }


def kosmos_2() -> tuple[Any, Any]:
    """Kosmos-2: the image has the ids that follow <unk>, which are those of ordinary words too."""
    torch.manual_seed(0)
    tok = tokenizer({}, ["<unk>"])
    tok.unk_token = "<unk>"
    processor = Kosmos2Processor(_clip(), tok, num_patch_index_tokens=4)
    config = Kosmos2Config(text_config=_kosmos_text(tok), vision_config=TOWER)
    return Kosmos2ForConditionalGeneration(config), processor


def kosmos_2_5() -> tuple[Any, Any]:
    """Kosmos-2.5: the image has the id of <s>."""
    torch.manual_seed(0)
    tok = tokenizer({"boi_token": "<image>", "eoi_token": "</image>", "image_token": "<s>"}, ["<ocr>", "<md>"])
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Kosmos2_5Config(
        text_config=_kosmos_text(tok),
        vision_config={**vision, "head_dim": 12, "patch_embed_hidden_size": 8 * 8 * 3, "max_num_patches": 32},
        latent_query_num=8,
    )
    images = Kosmos2_5ImageProcessorPil(patch_size={"height": 8, "width": 8})
    processor = Kosmos2_5Processor(images, tok, num_image_tokens=8)
    processor.images_kwargs = {**processor.images_kwargs, "max_patches": 32}
    return Kosmos2_5ForConditionalGeneration(config), processor


def _kosmos_vision(inputs: dict[str, Any]) -> Any:
    return inputs["image_embeds_position_mask"] == 1


def phi4_multimodal() -> tuple[Any, Any]:
    """Phi-4-multimodal: the vision tower is inside the decoder; its processor assumes 32 x 32 patches a crop."""
    torch.manual_seed(0)
    tok = tokenizer({"image_token": "<|image|>", "audio_token": "<|audio|>"}, [])
    vision = {**TOWER, "patch_size": 14, "image_size": 448, "image_token_id": tok.image_token_id}
    audio = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_blocks": 1,
        "num_attention_heads": 2,
        "ext_pw_out_channel": 16,
        "depthwise_separable_out_channel": 16,
        "nemo_conv_channels": 16,
        "audio_token_id": tok.audio_token_id,
    }
    text = {**sizes(tok), "max_position_embeddings": 2048}
    config = Phi4MultimodalConfig(vision_config=vision, audio_config=audio, **text)
    processor = Phi4MultimodalProcessor(Phi4MultimodalImageProcessor(), Phi4MultimodalFeatureExtractor(), tok)
    return Phi4MultimodalForCausalLM(config), processor


def git() -> tuple[Any, Any]:
    """GIT: image states go before the text's, without ids."""
    torch.manual_seed(0)
    tok = tokenizer({}, [])
    return GitForCausalLM(GitConfig(vision_config=TOWER, **sizes(tok))), GitProcessor(_clip(), tok)


def florence2() -> tuple[Any, Any]:
    """Florence-2: the image goes to the encoder."""
    torch.manual_seed(0)
    tok = tokenizer({"image_token": "<image>"}, [])
    layers = {"encoder_layers": 2, "decoder_layers": LAYERS, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    text = BartConfig(vocab_size=len(tok), d_model=HIDDEN, encoder_ffn_dim=64, decoder_ffn_dim=64, **layers)
    widths = {"embed_dim": (8, 8, 8, 16), "num_heads": (1, 1, 1, 2), "num_groups": (1, 1, 1, 2)}
    vision = {"depths": (1, 1, 1, 1), **widths, "window_size": 1, "projection_dim": HIDDEN}
    config = Florence2Config(text_config=text.to_dict(), vision_config=vision, image_token_id=tok.image_token_id)
    images = _clip()
    images.image_seq_length = 2
    return Florence2ForConditionalGeneration(config), Florence2Processor(images, tok)


def udop() -> tuple[Any, Any]:
    """UDOP: a document's words with their boxes, in an encoder."""
    torch.manual_seed(0)
    tok = tokenizer({}, [])
    widths = {
        "d_model": HIDDEN,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": LAYERS,
        "num_heads": 4,
        "decoder_start_token_id": 0,
    }
    config = UdopConfig(vocab_size=len(tok), image_size=32, patch_size=8, **widths)
    images = LayoutLMv3ImageProcessorPil(apply_ocr=False, size={"height": 32, "width": 32})
    return UdopForConditionalGeneration(config), UdopProcessor(images, tok)


FAMILIES = [
    Family("florence2", florence2, refused="encoder-decoder"),
    Family("git", git, refused="no vision tokens"),
    Family("kosmos-2", kosmos_2, "{text}", vision_at=_kosmos_vision, **PLACED),
    Family("kosmos-2.5", kosmos_2_5, "{text}", vision_at=_kosmos_vision, **PLACED),
    Family(
        "phi4_multimodal",
        phi4_multimodal,
        "<|image|>{text}",
        vision=lambda config: (config.vision_config.image_token_id,),
        alone=True,
        note="the vision tower is causal where no patch is masked",
    ),
    Family("udop", udop, refused="encoder-decoder"),
]
