# SPDX-License-Identifier: Apache-2.0
"""Tiny random assets for the real TinyLLaVA Factory: those of the original LLaVA, and a Phi.

TinyLLaVA tells families apart by the names of their folders.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

from tests.llava.assets import HIDDEN, LAYERS, Assets
from tests.llava.assets import build as build_original
from tests.samples import SENTENCE

LANGUAGE_MODELS = ("tinyllama", "tiny-phi")
_END = "<|endoftext|>"


def build(folder: Path) -> Assets:
    """Write all assets below ``folder``; language models under the names of LANGUAGE_MODELS."""
    assets = build_original(folder)
    (folder / "tinyllama").symlink_to(assets.language_model.name)
    _write_phi(folder / "tiny-phi")
    return assets


def _write_phi(folder: Path) -> None:
    """As Phi-2 has it: no token at the beginning, and one token that is end, padding and unknown."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([SENTENCE] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=_END, eos_token=_END, unk_token=_END)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    PhiForCausalLM(config).save_pretrained(folder)
