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
)

from tests.samples import SENTENCE, pairs, write_folders

HIDDEN, LAYERS = 32, 3
MODEL_MAX_LENGTH = 128


@dataclass(frozen=True)
class Assets:
    """Where everything is."""

    language_model: Path
    vision_tower: Path
    data: Path
    train_images: Path
    probe_images: Path
    probe_texts: Path


def build(folder: Path, train_count: int = 48, probe_count: int = 6) -> Assets:
    """Write all assets below ``folder``."""
    assets = Assets(
        language_model=folder / "tiny-vicuna",
        vision_tower=folder / "tiny-clip-vit",
        data=folder / "data.json",
        train_images=folder / "train" / "images",
        probe_images=folder / "probe" / "images",
        probe_texts=folder / "probe" / "texts",
    )
    write_folders(folder / "train", train_count, seed=1)
    write_folders(folder / "probe", probe_count, seed=2)
    _write_data(assets.data, train_count)
    _write_language_model(assets.language_model)
    _write_vision_tower(assets.vision_tower)
    return assets


def _write_data(path: Path, count: int) -> None:
    records = [
        {
            "id": str(index),
            "image": f"part{index % 2}/{index:03d}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nDescribe the image concisely."},
                {"from": "gpt", "value": text},
            ],
        }
        for index, (_, text) in enumerate(pairs(count, seed=1))
    ]
    path.write_text(json.dumps(records))


def _write_language_model(folder: Path) -> None:
    folder.mkdir(parents=True)
    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([SENTENCE, "Describe the image concisely. number 0123456789"] * 20),
        model_writer=trained,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(trained.getvalue())
    tokenizer = LlamaTokenizer(str(folder / "tokenizer.model"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _write_vision_tower(folder: Path) -> None:
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    CLIPVisionModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
