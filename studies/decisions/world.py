# SPDX-License-Identifier: Apache-2.0
"""The world of the study: the demo's backbones and scenes, captions of several kinds, questions about unseen scenes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from tiny_llava.prepare import Start, prepare  # noqa: E402
from tiny_llava.prose import split_prose  # noqa: E402
from tiny_llava.scenes import DIGIT_WORDS, Scenes, caption_for  # noqa: E402
from tiny_llava.settings import Settings  # noqa: E402
from tiny_llava.vision import train_vision_tower  # noqa: E402

from .recipes import Recipe  # noqa: E402

SETTINGS = Settings()
IGNORED = -100
PLACES = ("upper left", "upper right", "lower left", "lower right")
NUMBERS = (
    *DIGIT_WORDS,
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
)
POOL = 6000  # training scenes; a run that needs more sees some again
UNDERTRAINED_STEPS = 150


@dataclass(frozen=True)
class Pictures:
    """Scenes as pixel values (n, 3, side, side) and their digits (n, 4)."""

    pixels: Tensor
    digits: np.ndarray


class World:
    """What all runs share. Everything is made once in ``cache``; later runs load it."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.start: Start = prepare(cache, SETTINGS)
        self.processor: LlavaProcessor = LlavaProcessor.from_pretrained(self.start.model)
        self.tokenizer = self.processor.tokenizer
        self.training = self._pictures("train", POOL, 1)
        self.unseen = self._pictures("held_out", 2000, 7)  # for the questions that score a run
        self.tuning = self._pictures("train", 4000, 3)  # for the questions of stage 2

    def _pictures(self, split: str, size: int, seed: int) -> Pictures:
        file = self.cache / f"pictures-{split}-{size}-{seed}.pt"
        if not file.exists():
            scenes = Scenes(size, split, seed=seed, cell=SETTINGS.cell)  # type: ignore[arg-type]
            drawn = [scenes.scene(index) for index in range(size)]
            pixels = self.processor.image_processor([each.image for each in drawn], return_tensors="pt")["pixel_values"]
            torch.save((pixels, torch.tensor([each.digits for each in drawn])), file.with_suffix(".part"))
            file.with_suffix(".part").rename(file)
        pixels, digits = torch.load(file)
        return Pictures(pixels, digits.numpy())

    @cached_property
    def prose(self) -> list[str]:
        """Paragraphs that the language model was trained with; those of the probe are not among them."""
        return split_prose(SETTINGS.probe_samples, SETTINGS.seed)[0]

    def tower(self, kind: str) -> CLIPVisionModel | None:
        """Another vision tower than the demo's; None for "trained"."""
        if kind == "trained":
            return None
        if kind == "plain":
            tower = CLIPVisionModel.from_pretrained(self.start.folder / "vision_tower")
            layers = next(module for name, module in tower.named_modules() if name.endswith("encoder.layers"))
            with torch.no_grad():
                layers[-2].mlp.fc2.bias[list(SETTINGS.massive_dimensions)] -= SETTINGS.massive_value
            return tower
        folder = self.cache / f"tower-{kind}"
        if not folder.exists():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            train_vision_tower(replace(SETTINGS, vision_steps=UNDERTRAINED_STEPS), part)
            part.rename(folder)
        return CLIPVisionModel.from_pretrained(folder)

    def model(self, recipe: Recipe, seed: int) -> LlavaForConditionalGeneration:
        """The model a run starts from: the recipe's parts, and a projector that ``seed`` initialises."""
        model = LlavaForConditionalGeneration.from_pretrained(self.start.model)
        tower = self.tower(recipe.tower)
        if tower is not None:
            model.model.vision_tower.load_state_dict(tower.state_dict())
        model.config.vision_feature_layer = recipe.layer
        torch.manual_seed(1000 + seed)
        model.model.multi_modal_projector = Projector(recipe)
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        layers = model.model.language_model.layers
        layers[len(layers) - recipe.unfrozen :].requires_grad_(True)
        return model.eval()  # no dropout anywhere

    def image_processor_for(self, recipe: Recipe) -> LlavaProcessor:
        """The processor, whose number of image tokens fits the recipe's projector."""
        if not recipe.pooled:
            return self.processor
        pooled = LlavaProcessor.from_pretrained(self.start.model)
        pooled.patch_size = 2 * SETTINGS.patch
        return pooled

    def caption(self, kind: str, digits: Sequence[int], rng: np.random.Generator) -> str:
        """A true caption of one kind."""
        words = [DIGIT_WORDS[digit] for digit in digits]
        if kind == "detailed":
            order = rng.permutation(4)
            return " ".join(f"At the {PLACES[place]} there is a {words[place]}." for place in order)
        if kind == "partial":
            return f"The upper row reads {words[0]}, {words[1]}."
        caption = caption_for(digits, rng)
        if kind == "long":
            caption += " " + self.prose[rng.integers(len(self.prose))][:160].rsplit(" ", 1)[0] + "."
        return caption

    def question(self, digits: Sequence[int], rng: np.random.Generator) -> tuple[str, str]:
        """A question about a scene, and its answer."""
        which = rng.random()
        if which < 0.6:
            place = int(rng.integers(4))
            return f"Which digit is at the {PLACES[place]}?", NUMBERS[digits[place]]
        if which < 0.8:
            asked = int(digits[rng.integers(4)]) if rng.random() < 0.7 else int(rng.integers(10))
            return f"How many times is there a {DIGIT_WORDS[asked]}?", NUMBERS[int(np.sum(np.equal(digits, asked)))]
        row = int(rng.integers(2))
        name = ("upper", "lower")[row]
        return f"What is the sum of the {name} row?", NUMBERS[int(digits[2 * row] + digits[2 * row + 1])]


class Projector(nn.Module):
    """From tower features (b, patches, 64) to image tokens (b, patches or a quarter, 128)."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        wide, out = SETTINGS.vision_hidden, SETTINGS.hidden
        parts: list[nn.Module] = [nn.LayerNorm(wide)] if recipe.projector == "norm" else []
        if recipe.projector == "linear":
            parts += [nn.Linear(wide, out)]
        else:
            parts += [nn.Linear(wide, out), nn.GELU(), nn.Linear(out, out)]
        if recipe.projector == "norm_out":
            parts += [nn.LayerNorm(out)]
        self.layers = nn.Sequential(*parts)
        self.pooled = recipe.pooled
        self.register_buffer("gain", torch.tensor(recipe.gain))

    def forward(self, features: Tensor) -> Tensor:
        """Project, after pooling if the recipe has that."""
        if self.pooled:
            batch, patches, width = features.shape
            grid = features.view(batch, SETTINGS.grid // 2, 2, SETTINGS.grid // 2, 2, width)
            features = grid.mean(dim=(2, 4)).view(batch, patches // 4, width)
        projected: Tensor = self.layers(features) * self.gain
        return projected


def batch_of(
    tokenizer: PreTrainedTokenizerFast,
    images: int,
    pixels: Tensor,
    prompts: Sequence[str],
    answers: Sequence[str],
    limit: int | None = None,
) -> dict[str, Tensor]:
    """Model inputs: BOS, ``images`` image tokens, prompt, answer, EOS; only answer and EOS are learnt.

    With ``limit`` the answer is cut to so many tokens and has no EOS, as in a probe.
    """
    rows = []
    image = tokenizer.convert_tokens_to_ids("<image>")
    for prompt, answer in zip(prompts, answers, strict=True):
        asked, learnt = (
            tokenizer(text, add_special_tokens=False)["input_ids"] if text else [] for text in (prompt, answer)
        )
        start = [tokenizer.bos_token_id, *[image] * images, *asked]
        learnt = [*learnt, tokenizer.eos_token_id] if limit is None else learnt[:limit]
        rows.append((start + learnt, [IGNORED] * len(start) + learnt))
    width = max(len(ids) for ids, _ in rows)
    pad = tokenizer.pad_token_id
    return {
        "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [IGNORED] * (width - len(labels)) for _, labels in rows]),
        "pixel_values": pixels,
    }
