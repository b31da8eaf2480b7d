# SPDX-License-Identifier: Apache-2.0
"""A tiny LLaVA that has learnt nothing, its data and its probe, made in seconds: for examples of loops.

All but the vision tower is trained, with dropout. The values of MIR mean nothing here; that they are there does.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from mir_callback import Probe
from mir_callback.history import FILE_NAME

from .language import language_config
from .prose import split_prose
from .scenes import Scenes
from .settings import Settings
from .tokenizer import EOS, IMAGE, train_tokenizer
from .vision import FEATURE_LAYER, make_image_processor, vision_config

SIZES = Settings(
    **{"vocab": 512, "hidden": 32, "layers": 3, "intermediate": 64, "probe_samples": 12},
    **{"vision_hidden": 32, "vision_layers": 2, "vision_heads": 2, "vision_intermediate": 64},
)
# An image is one token, and nothing marks who speaks.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    f"{{{{ '{IMAGE}' if part.type == 'image' else part.text }}}}{{% endfor %}}{{% endfor %}}{EOS}"
)


def make_model() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA with random weights, the same at each call, and its processor."""
    prose, _ = split_prose(SIZES.probe_samples, SIZES.seed)
    tokenizer = train_tokenizer(prose[:500], SIZES.vocab)
    processor = LlavaProcessor(
        image_processor=make_image_processor(SIZES),
        tokenizer=tokenizer,
        patch_size=SIZES.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    config = LlavaConfig(
        vision_config=vision_config(SIZES).to_dict(),
        text_config={**language_config(SIZES, tokenizer).to_dict(), "attention_dropout": 0.1},
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=FEATURE_LAYER,
        image_seq_length=SIZES.grid**2,
    )
    torch.manual_seed(SIZES.seed)
    model = LlavaForConditionalGeneration(config).train()
    model.model.vision_tower.requires_grad_(False)  # as LLaVA's is
    return model, processor


def make_data(size: int) -> Scenes:
    """Scenes with captions, for a :class:`~tiny_llava.collator.CaptionCollator`."""
    return Scenes(size, "train", seed=1, cell=SIZES.cell)


def make_probe() -> Probe:
    """Scenes of scans that are not trained with, each with a piece of prose."""
    _, held_out = split_prose(SIZES.probe_samples, SIZES.seed)
    scenes = Scenes(SIZES.probe_samples, "held_out", seed=SIZES.seed, cell=SIZES.cell)
    return Probe.from_pairs([(scenes.scene(index).image, text) for index, text in enumerate(held_out)])


def parse_options(about: str | None, arguments: Sequence[str] | None, output: str) -> argparse.Namespace:
    """The command line of an example of a loop."""
    parser = argparse.ArgumentParser(description=(about or "").split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(output), help="folder of the run")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of AdamW")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
    return parser.parse_args(arguments)


def say_where(output: Path) -> None:
    """Where to look when the run has ended."""
    print(f"\nThe values are in {output / FILE_NAME}. As a page: mir report {output}")
