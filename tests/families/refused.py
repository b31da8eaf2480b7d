# SPDX-License-Identifier: Apache-2.0
"""Models of the same mapping that have no image features among the tokens of a decoder, of makers without a file."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    EvollaConfig,
    EvollaForProteinText2Text,
    EvollaProcessor,
    PI0Config,
    PI0ForConditionalGeneration,
    PI0ImageProcessor,
    PI0Processor,
    Pix2StructConfig,
    Pix2StructForConditionalGeneration,
    Pix2StructImageProcessorPil,
    Pix2StructProcessor,
    PPFormulaNetConfig,
    PPFormulaNetForConditionalGeneration,
    PPFormulaNetImageProcessor,
    PPFormulaNetProcessor,
    TrOCRConfig,
    TrOCRProcessor,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
)

from tests.families.registry import Family
from tests.tiny_models import HIDDEN, LAYERS, TOWER, sizes, tokenizer

SQUARE = {"height": 32, "width": 32}


def evolla() -> tuple[Any, Any]:
    """Evolla: text about proteins, which have no image."""
    torch.manual_seed(0)
    tok = tokenizer({}, ["<|reserved_special_token_0|>"])
    protein = {"vocab_size": 33, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    resampler = {"resampler_depth": 1, "resampler_dim_head": 8, "resampler_heads": 2, "resampler_num_latents": 4}
    config = EvollaConfig(
        **sizes(tok),
        protein_encoder_config={**protein, "intermediate_size": 48},
        aligner_num_add_layers=1,
        **resampler,
    )
    return EvollaForProteinText2Text(config), EvollaProcessor(tokenizer({}, []), tok)


def pi0() -> tuple[Any, Any]:
    """pi0: a policy for robots, whose sequence ends in actions, not text; it needs the robot's state."""
    torch.manual_seed(0)
    tok = tokenizer({}, [])
    images = PI0ImageProcessor(size={"max_height": 32, "max_width": 32}, pad_size=SQUARE)
    images.image_seq_length = 16
    processor = PI0Processor(images, tok, chunk_size=4)
    text = {"model_type": "gemma", **sizes(tok), "head_dim": 8}
    config = PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "text_config": text,
            "vision_config": {"model_type": "siglip_vision_model", **TOWER},
            "projection_dim": HIDDEN,
            "image_token_id": processor.image_token_id,
        },
        dit_config=text,
        chunk_size=4,
    )
    return PI0ForConditionalGeneration(config), processor


def pix2struct() -> tuple[Any, Any]:
    """Pix2Struct: the text is drawn into the image."""
    torch.manual_seed(0)
    tok = tokenizer({}, [])
    widths = {"hidden_size": HIDDEN, "d_kv": 8, "d_ff": 64}
    config = Pix2StructConfig(
        text_config={"vocab_size": len(tok), **widths, "num_layers": LAYERS, "num_heads": 4},
        vision_config={
            **widths,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_embed_hidden_size": 8 * 8 * 3,
            "seq_len": 32,
        },
    )
    images = Pix2StructImageProcessorPil(patch_size={"height": 8, "width": 8}, max_patches=32)
    return Pix2StructForConditionalGeneration(config), Pix2StructProcessor(images, tok)


def pp_formulanet() -> tuple[Any, Any]:
    """PP-FormulaNet: images of formulas to LaTeX."""
    torch.manual_seed(0)
    tok = tokenizer({}, [])
    text = {"encoder_layers": 1, "decoder_layers": LAYERS, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    vision = {
        "hidden_size": 24,
        "output_channels": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 4,
        "global_attn_indexes": [0],
        "mlp_dim": 48,
        "post_conv_in_channels": 16,
        "post_conv_mid_channels": 16,
        "post_conv_out_channels": 16,
        "decoder_hidden_size": HIDDEN,
    }
    config = PPFormulaNetConfig(
        text_config={"vocab_size": len(tok), "d_model": HIDDEN, "decoder_ffn_dim": 64, **text}, vision_config=vision
    )
    return PPFormulaNetForConditionalGeneration(config), PPFormulaNetProcessor(PPFormulaNetImageProcessor(), tok)


def vision_encoder_decoder() -> tuple[Any, Any]:
    """A ViT and a text decoder that attends to it, as in TrOCR and Donut."""
    torch.manual_seed(0)
    tok = tokenizer({}, [])
    decoder = TrOCRConfig(
        vocab_size=len(tok), d_model=HIDDEN, decoder_layers=LAYERS, decoder_attention_heads=4, decoder_ffn_dim=64
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**TOWER), decoder)
    return VisionEncoderDecoderModel(config), TrOCRProcessor(ViTImageProcessorPil(size=SQUARE), tok)


FAMILIES = [
    Family("evolla", evolla, refused="no vision tokens"),
    Family("pi0", pi0, refused="decoder layers"),
    Family("pix2struct", pix2struct, refused="encoder-decoder"),
    Family("pp_formulanet", pp_formulanet, refused="encoder-decoder"),
    Family("vision-encoder-decoder", vision_encoder_decoder, refused="encoder-decoder"),
]
