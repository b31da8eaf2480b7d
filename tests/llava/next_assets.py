# SPDX-License-Identifier: Apache-2.0
"""What LLaVA-NeXT needs beyond tests.llava.assets: more language models, a SigLIP in a hub cache, images wide and tall.

Run in an environment with LLaVA-NeXT on the path: `python -m tests.llava.next_assets FOLDER`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from llava.model.multimodal_encoder.siglip_encoder import SigLipVisionConfig, SigLipVisionModel
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    LlamaTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from tests.llava import assets
from tests.samples import SENTENCE

# LLaVA-NeXT takes a vision tower for SigLIP by its name, if no path of that name exists: it has to come from a cache.
SIGLIP = "tiny/siglip"
SIZES = {
    "hidden_size": assets.HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": assets.LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 8192,
}
PROBE_IMAGE_SIZES = [(96, 40), (40, 96), (64, 64), (70, 30), (33, 50), (128, 100)]


def build(folder: Path) -> None:
    """Write all assets below ``folder``; the hub cache is ``folder``/hub."""
    assets.build(folder)
    rng = np.random.default_rng(5)
    for path, (width, height) in zip(
        sorted((folder / "probe" / "images").rglob("*.png")), PROBE_IMAGE_SIZES, strict=True
    ):
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
    _write_qwen(folder / "tiny-qwen")
    _write_mixtral(folder / "tiny-mixtral", LlamaTokenizer.from_pretrained(folder / "tiny-vicuna"))
    _write_siglip(folder / "hub" / "models--tiny--siglip")


def _write_qwen(folder: Path) -> None:
    folder.mkdir()
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([SENTENCE, "system user assistant You are a helpful assistant."] * 9, vocab_size=320)
    trained.save_model(str(folder))
    tokenizer = Qwen2Tokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        unk_token=None,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 2, "sliding_window": 8192, "tie_word_embeddings": False}
    Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)


def _write_mixtral(folder: Path, tokenizer: LlamaTokenizer) -> None:
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 2, "num_local_experts": 4}
    MixtralForCausalLM(MixtralConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)


def _write_siglip(folder: Path) -> None:
    """27 x 27 patches of width 1152, which LLaVA-NeXT takes for granted; everything else tiny."""
    torch.manual_seed(1)
    snapshot = folder / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")
    SigLipVisionModel(SigLipVisionConfig(intermediate_size=32, num_hidden_layers=2)).save_pretrained(snapshot)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
