# SPDX-License-Identifier: Apache-2.0
"""Tiny random assets for the real LLaVA training script, made offline: language model, vision tower, data."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    MistralConfig,
    MistralForCausalLM,
)

from tests.samples import SENTENCE, pairs, write_folders

HIDDEN, LAYERS = 32, 3
VOCABULARY = 320


@dataclass(frozen=True)
class Assets:
    """Where everything is."""

    language_model: Path
    mistral: Path
    vision_tower: Path
    wide_vision_tower: Path
    data: Path
    mixed_data: Path
    train_images: Path
    probe_images: Path
    probe_texts: Path


def build(folder: Path, train_count: int = 48, probe_count: int = 6) -> Assets:
    """Write all assets below ``folder``."""
    assets = Assets(
        language_model=folder / "tiny-vicuna",
        mistral=folder / "tiny-mistral",
        vision_tower=folder / "tiny-clip-vit",
        wide_vision_tower=folder / "tiny-clip-vit-wide",
        data=folder / "data.json",
        mixed_data=folder / "mixed_data.json",
        train_images=folder / "train" / "images",
        probe_images=folder / "probe" / "images",
        probe_texts=folder / "probe" / "texts",
    )
    write_folders(folder / "train", train_count, seed=1)
    write_folders(folder / "probe", probe_count, seed=2)
    _write_data(assets.data, train_count)
    _write_data(assets.mixed_data, train_count, text_only=2)
    for language_model in (assets.language_model, assets.mistral):
        _write_tokenizer(language_model)
    _write_language_models(assets)
    _write_vision_tower(assets.vision_tower, width=24)
    _write_vision_tower(assets.wide_vision_tower, width=HIDDEN)
    return assets


def _write_data(path: Path, count: int, text_only: int | None = None) -> None:
    """LLaVA's records; every ``text_only``-th is a conversation without an image."""
    records = []
    for index, (_, text) in enumerate(pairs(count, seed=1)):
        record = {"id": str(index), "conversations": [{"from": "gpt", "value": text}]}
        question = "Describe the image concisely."
        if text_only is None or index % text_only:
            record["image"] = f"part{index % 2}/{index:03d}.png"
            question = f"<image>\n{question}"
        record["conversations"].insert(0, {"from": "human", "value": question})
        records.append(record)
    path.write_text(json.dumps(records))


def _write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True)
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([SENTENCE, "Describe the image concisely. number 0123456789"] * 20),
        model_writer=trained,
        vocab_size=VOCABULARY,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    LlamaTokenizer(str(folder / "tokenizer.model")).save_pretrained(folder)


def _write_language_models(assets: Assets) -> None:
    common = {
        "vocab_size": len(LlamaTokenizer.from_pretrained(assets.language_model)),
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(num_key_value_heads=4, **common)).save_pretrained(assets.language_model)
    MistralForCausalLM(MistralConfig(num_key_value_heads=2, **common)).save_pretrained(assets.mistral)


def _write_vision_tower(folder: Path, width: int) -> None:
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
