# SPDX-License-Identifier: Apache-2.0
"""BLIP and its descendants, whose processors place the image themselves."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipVideoConfig,
    InstructBlipVideoForConditionalGeneration,
    InstructBlipVideoProcessor,
    InstructBlipVideoVideoProcessor,
    LlamaConfig,
    OPTConfig,
    T5Config,
)

from tests.families.parts import PLACED
from tests.families.registry import Family
from tests.tiny_models import HIDDEN, LAYERS, TOWER, sizes, tokenizer

QUERIES = 4
QFORMER = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}
VISION = {**TOWER, "initializer_range": 0.2}


def _images() -> BlipImageProcessorPil:
    return BlipImageProcessorPil(size={"height": 32, "width": 32})


def _parts(token: str) -> tuple[Any, dict[str, Any]]:
    """A tokenizer, and what the configurations have in common."""
    torch.manual_seed(0)
    tok = tokenizer({}, [f"<{token}>"])
    qformer = {**QFORMER, "vocab_size": len(tok)}
    index = {f"{token}_token_index": tok.convert_tokens_to_ids(f"<{token}>")}
    return tok, {"vision_config": VISION, "qformer_config": qformer, "num_query_tokens": QUERIES, **index}


def _t5(tok: Any) -> dict[str, Any]:
    text = {"d_model": HIDDEN, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_heads": 4}
    return dict(T5Config(vocab_size=len(tok), decoder_start_token_id=0, **text).to_dict())


def _warm(model: Any) -> Any:
    """The model with query tokens that differ: they start at zero."""
    torch.nn.init.normal_(model.query_tokens)
    return model


def blip_2() -> tuple[Any, Any]:
    """BLIP-2 with an OPT decoder, which has learned positions."""
    tok, parts = _parts("image")
    text = {**sizes(tok), "ffn_dim": 64, "word_embed_proj_dim": HIDDEN}
    config = Blip2Config(text_config=OPTConfig(**text).to_dict(), **parts)
    return _warm(Blip2ForConditionalGeneration(config)), Blip2Processor(_images(), tok, num_query_tokens=QUERIES)


def blip_2_t5() -> tuple[Any, Any]:
    """BLIP-2 with a T5: the image goes to its encoder."""
    tok, parts = _parts("image")
    config = Blip2Config(text_config=_t5(tok), **parts)
    return _warm(Blip2ForConditionalGeneration(config)), Blip2Processor(_images(), tok, num_query_tokens=QUERIES)


def instructblip_t5() -> tuple[Any, Any]:
    """InstructBLIP with a T5; only the text's configuration says that it is an encoder-decoder."""
    tok, parts = _parts("image")
    config = InstructBlipConfig(text_config=_t5(tok), **parts)
    processor = InstructBlipProcessor(_images(), tok, tokenizer({}, []), num_query_tokens=QUERIES)
    return _warm(InstructBlipForConditionalGeneration(config)), processor


def blip() -> tuple[Any, Any]:
    """BLIP: a captioner whose text decoder attends to the image."""
    torch.manual_seed(0)
    tok = tokenizer({}, [])
    text = {**sizes(tok), "encoder_hidden_size": 24}
    config = BlipConfig(text_config=text, vision_config=TOWER)
    return BlipForConditionalGeneration(config), BlipProcessor(_images(), tok)


def instructblip() -> tuple[Any, Any]:
    """InstructBLIP with a Llama decoder; its Q-Former reads the text too."""
    tok, parts = _parts("image")
    config = InstructBlipConfig(text_config=LlamaConfig(**sizes(tok)).to_dict(), **parts)
    tok.padding_side = "left"  # as Llama's
    processor = InstructBlipProcessor(_images(), tok, tokenizer({}, []), num_query_tokens=QUERIES)
    return _warm(InstructBlipForConditionalGeneration(config)), processor


def instructblipvideo() -> tuple[Any, Any]:
    """InstructBLIP over four frames."""
    tok, parts = _parts("video")
    config = InstructBlipVideoConfig(text_config=LlamaConfig(**sizes(tok)).to_dict(), **parts)
    videos = InstructBlipVideoVideoProcessor(size={"height": 32, "width": 32})
    processor = InstructBlipVideoProcessor(videos, tok, tokenizer({}, []), num_query_tokens=QUERIES)
    return _warm(InstructBlipVideoForConditionalGeneration(config)), processor


def _states(outputs: Any) -> Any:
    return outputs.language_model_outputs.hidden_states


FAMILIES = [
    Family("blip", blip, refused="cross-attention"),
    Family("blip-2", blip_2, "{text}", states=_states, **PLACED),
    Family("blip-2 (T5)", blip_2_t5, refused="encoder-decoder"),
    Family(
        "instructblip",
        instructblip,
        "{text}",
        states=_states,
        alone=True,
        one_image=PLACED["one_image"],
        note="the processor places the image, and pads between it and the text",
    ),
    Family("instructblip (T5)", instructblip_t5, refused="encoder-decoder"),
    Family("instructblipvideo", instructblipvideo, refused="image_processor"),
]
