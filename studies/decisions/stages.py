# SPDX-License-Identifier: Apache-2.0
"""Stage 1 (captions), which keeps its weights wherever MIR is measured, and stage 2 (questions), which scores them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from .recipes import Recipe
from .world import IGNORED, POOL, SETTINGS, World, batch_of

POINTS = 32  # evaluations of a run after the one before its first step
TUNING_STEPS, TUNING_BATCH, TUNING_RATE = 150, 16, 1e-3


def points(recipe: Recipe) -> list[int]:
    """The steps after which MIR is measured."""
    return sorted({round(recipe.steps * number / POINTS) for number in range(POINTS + 1)})


def fixed_stop(recipe: Recipe) -> int:
    """The point at three quarters of a run, which a stop rule has to be better than."""
    return points(recipe)[3 * POINTS // 4]


def images_of(recipe: Recipe) -> int:
    """Image tokens of a scene."""
    return SETTINGS.grid**2 // (4 if recipe.pooled else 1)


def train(world: World, recipe: Recipe, seed: int, folder: Path) -> list[float]:
    """Stage 1. Writes the trained weights of each point to ``folder``; returns the loss of every step."""
    model = world.model(recipe, seed)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    projector = [weight for name, weight in trained.items() if "multi_modal_projector" in name]
    language = [weight for name, weight in trained.items() if "multi_modal_projector" not in name]
    groups = [{"params": projector, "lr": recipe.rate}]
    groups += [{"params": language, "lr": 0.1 * recipe.rate}] if language else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warm = max(1, round(0.03 * recipe.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warm, 0.5 * (1 + math.cos(math.pi * max(0, step - warm) / max(1, recipe.steps - warm)))
        ),
    )
    batches = _caption_batches(world, recipe, seed)
    due, losses = set(points(recipe)), []
    gain = model.model.multi_modal_projector.gain
    folder.mkdir(parents=True, exist_ok=True)
    for step in range(recipe.steps + 1):
        progress = max(0.0, 2 * step / recipe.steps - 1)
        gain.fill_(recipe.gain * recipe.shrink**progress)
        if step in due:
            torch.save(
                {"gain": gain.clone(), **{n: w.detach().clone() for n, w in trained.items()}}, folder / f"{step:05d}.pt"
            )
        if step == recipe.steps:
            break
        loss = model(**next(batches), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def restore(model: LlavaForConditionalGeneration, file: Path) -> None:
    """Give a model the weights of one point."""
    weights, parameters = torch.load(file), dict(model.named_parameters())
    model.model.multi_modal_projector.gain.copy_(weights.pop("gain"))
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)


def tune_and_score(world: World, model: LlavaForConditionalGeneration, recipe: Recipe, seed: int) -> float:
    """Stage 2 from the model's weights: projector and language model learn to answer; the share answered right."""
    model.requires_grad_(False)
    for part in (model.model.multi_modal_projector, model.model.language_model, model.lm_head):
        part.requires_grad_(True)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=TUNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 8, 0.5 * (1 + math.cos(math.pi * step / TUNING_STEPS)))
    )
    rng = np.random.default_rng((2, seed))
    for _ in range(TUNING_STEPS):
        chosen = rng.integers(len(world.tuning.digits), size=TUNING_BATCH)
        asked = [world.question(world.tuning.digits[index], rng) for index in chosen]
        batch = _question_batch(world, recipe, world.tuning.pixels[chosen], asked)
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return score(world, model, recipe)


@torch.no_grad()
def score(world: World, model: LlavaForConditionalGeneration, recipe: Recipe) -> float:
    """Share of the questions about unseen scenes that greedy decoding answers exactly.

    It does if each token of the answer, its end included, is the likeliest one after those before it.
    """
    rng, right = np.random.default_rng(99), 0
    asked = [world.question(digits, rng) for digits in world.unseen.digits]
    for start in range(0, len(asked), 250):
        batch = _question_batch(world, recipe, world.unseen.pixels[start : start + 250], asked[start : start + 250])
        labels = batch.pop("labels")[:, 1:]
        likeliest = model(**batch, use_cache=False).logits[:, :-1].argmax(-1)
        right += int(((likeliest == labels) | (labels == IGNORED)).all(dim=1).sum())
    return right / len(asked)


def _question_batch(world: World, recipe: Recipe, pixels: Tensor, asked: list[tuple[str, str]]) -> dict[str, Tensor]:
    prompts = [f"Question: {question} Answer:" for question, _ in asked]
    return batch_of(world.tokenizer, images_of(recipe), pixels, prompts, [answer for _, answer in asked])


def _caption_batches(world: World, recipe: Recipe, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of stage 1; recipes with the same seed see scenes in the same order."""
    order, rng = np.random.default_rng((1, seed)), np.random.default_rng((3, seed))
    size = recipe.samples or POOL
    queue: list[int] = []
    while True:
        while len(queue) < recipe.batch:
            queue += order.permutation(size).tolist()
        chosen, queue = queue[: recipe.batch], queue[recipe.batch :]
        captions = []
        for index in chosen:
            shown = int(rng.integers(POOL)) if rng.random() < recipe.shuffled else index
            captions.append(world.caption(recipe.captions, world.training.digits[shown], rng))
        pixels = world.training.pixels[chosen]
        pixels = torch.zeros_like(pixels) if recipe.blank else pixels
        yield batch_of(world.tokenizer, images_of(recipe), pixels, [""] * len(chosen), captions)
