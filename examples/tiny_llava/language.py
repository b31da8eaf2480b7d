# SPDX-License-Identifier: Apache-2.0
"""The language model: a tiny Llama that learns English prose, and captions from rasters of digit words.

The second task stands in for what a large language model knows anyway. It reads one digit word for each patch, in the
places where the patches themselves will later stand, and continues with the caption. Pre-training then only has to make
patches readable.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .progress import Progress, warm_up_and_decay
from .scenes import DIGIT_WORDS, caption_for, raster_words
from .settings import Settings
from .tokenizer import EOS, train_tokenizer

IGNORED = -100


def train_language_model(settings: Settings, prose: list[str], folder: Path) -> None:
    """Train a tokenizer, and a Llama on prose and on "raster of digit words -> caption"; write both to ``folder``."""
    tokenizer = train_tokenizer([*prose, *_example_captions(settings)], settings.vocab)
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(language_config(settings, tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.language_rate, weight_decay=0.05)
    schedule = warm_up_and_decay(optimizer, settings.language_steps)
    progress = Progress("language model", settings.language_steps)
    prose_batches = _prose_batches(settings, tokenizer, prose)
    caption_batches = _caption_batches(settings, tokenizer)
    for _ in range(settings.language_steps):
        on_prose = _loss(model, *next(prose_batches))
        on_captions = _loss(model, *next(caption_batches))
        (on_prose + on_captions).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.advance(prose_loss=on_prose.item(), caption_loss=on_captions.item())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def language_config(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Describe a Llama of the demo's size over the tokenizer's vocabulary."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        intermediate_size=settings.intermediate,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _loss(model: LlamaForCausalLM, inputs: Tensor, labels: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=inputs, labels=labels, use_cache=False).loss
    return loss


def _example_captions(settings: Settings) -> list[str]:
    rng = np.random.default_rng(settings.seed)
    return [caption_for(rng.integers(len(DIGIT_WORDS), size=4).tolist(), rng) for _ in range(500)]


def _prose_batches(
    settings: Settings, tokenizer: PreTrainedTokenizerFast, prose: list[str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of running prose and their labels; the paragraphs are shuffled anew for each pass, joined by ``</s>``."""
    rng = np.random.default_rng(settings.seed)
    encoded = [tokenizer(text + EOS)["input_ids"] for text in prose]
    size = settings.prose_batch * settings.prose_tokens
    while True:
        stream = [token for index in rng.permutation(len(encoded)) for token in encoded[index]]
        for start in range(0, len(stream) - size, size):
            rows = torch.tensor(stream[start : start + size]).view(settings.prose_batch, -1)
            yield rows, rows


def _caption_batches(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[Tensor, Tensor]]:
    """Rasters of digit words followed by their captions, and labels; only the captions are learnt."""
    rng = np.random.default_rng(settings.seed + 1)
    pad = tokenizer.pad_token_id
    while True:
        rows = []
        for _ in range(settings.caption_batch):
            digits = rng.integers(len(DIGIT_WORDS), size=4).tolist()
            raster = tokenizer(" ".join(raster_words(digits, settings.grid)))["input_ids"]
            caption = tokenizer(caption_for(digits, rng) + EOS, add_special_tokens=False)["input_ids"]
            rows.append((raster + caption, [IGNORED] * len(raster) + caption))
        width = max(len(inputs) for inputs, _ in rows)
        yield (
            torch.tensor([inputs + [pad] * (width - len(inputs)) for inputs, _ in rows]),
            torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows]),
        )
