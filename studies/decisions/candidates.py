# SPDX-License-Identifier: Apache-2.0
"""Metrics that were tried beside MIR and are not in the package, from the hidden states of one model, in float64.

They are for tiny models: all hidden states are in memory, and every distance is recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from mir_callback import frechet_distance, modality_integration_rate

NEIGHBOURS = 10
NULL_DRAWS = 8


@dataclass(frozen=True)
class States:
    """Vision and text rows of each layer, (N, d) float64, and the sample of each row."""

    vision: list[Tensor]
    text: list[Tensor]
    vision_sample: Tensor
    text_sample: Tensor
    before: Tensor  # tower features of each vision row
    after: Tensor  # what the projector makes of them


@torch.no_grad()
def collect(model: LlavaForConditionalGeneration, batches: Sequence[dict[str, Tensor]], image: int) -> States:
    """Forward batches of single image samples; ``image`` is the id of the image token."""
    visions: list[list[Tensor]] = []
    texts: list[list[Tensor]] = []
    samples: tuple[list[Tensor], list[Tensor]] = ([], [])
    features: list[Tensor] = []
    projected: list[Tensor] = []
    projector = model.model.multi_modal_projector
    hook = projector.register_forward_hook(
        lambda module, inputs, output: (features.append(inputs[0]), projected.append(output))[0]
    )
    first = 0
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
        is_image = ids == image
        is_text = mask & ~is_image & (is_image.cumsum(1) == is_image.sum(1, keepdim=True))
        hidden = model(**batch, output_hidden_states=True, use_cache=False).hidden_states[1:]
        visions.append([each[is_image].double() for each in hidden])
        texts.append([each[is_text].double() for each in hidden])
        for where, kept in zip((is_image, is_text), samples, strict=True):
            kept.append(where.nonzero()[:, 0] + first)
        first += len(ids)
    hook.remove()
    before, after = torch.cat(features).double(), torch.cat(projected).double()
    if before.shape[1] != after.shape[1]:  # pooled: each token against the mean of its patches
        side = math.isqrt(before.shape[1])
        grid = before.view(len(before), side // 2, 2, side // 2, 2, -1)
        before = grid.mean(dim=(2, 4)).flatten(1, 2)
    return States(
        [torch.cat(parts) for parts in zip(*visions, strict=True)],
        [torch.cat(parts) for parts in zip(*texts, strict=True)],
        torch.cat(samples[0]),
        torch.cat(samples[1]),
        before.flatten(0, 1),
        after.flatten(0, 1),
    )


def measure(states: States) -> dict[str, float]:
    """Every candidate; each a number for the whole model."""
    unit_vision, unit_text = (
        [each / each.norm(dim=1, keepdim=True) for each in part] for part in (states.vision, states.text)
    )
    unit = [frechet_distance(*pair) for pair in zip(unit_vision, unit_text, strict=True)]
    return {
        "paper_fast": modality_integration_rate(states.vision, states.text, root="paper_fast").mir,
        "unit_token_mir": math.log10(math.fsum(unit)),
        "unit_vision_rank": _mean_log([_effective_rank(each) for each in unit_vision]),
        "null_calibrated": _null_calibrated(states),
        "neighbours_kept": _neighbours_kept(states.before, states.after),
        "neighbours_kept_last": _neighbours_kept(states.before, states.vision[-1]),
    }


def measure_matched(states: States) -> dict[str, float]:
    """Candidates for samples whose texts describe their images."""
    found = []
    for vision, text in zip(states.vision, states.text, strict=True):
        of_images = _sample_means(vision, states.vision_sample)
        of_texts = _sample_means(text, states.text_sample)
        found.append(_neighbours_kept(of_images, of_texts))
    return {"modality_neighbours": sum(found) / len(found), "modality_neighbours_best": max(found)}


def _mean_log(values: Sequence[float]) -> float:
    return sum(math.log(value) for value in values) / len(values)


def _effective_rank(rows: Tensor) -> float:
    spectrum = torch.linalg.svdvals(rows - rows.mean(dim=0)) ** 2
    return float(spectrum.sum() ** 2 / (spectrum**2).sum())


def _null_calibrated(states: States) -> float:
    """log10 of the summed distances over what they are when each sample's modality labels are swapped at random."""
    count = int(states.vision_sample.max()) + 1
    rng = np.random.default_rng(0)
    swaps = torch.tensor(rng.random((NULL_DRAWS, count)) < 0.5)
    scale = [1 / text.norm(dim=1).mean() for text in states.text]
    real = math.fsum(
        frechet_distance(vision * by, text * by)
        for vision, text, by in zip(states.vision, states.text, scale, strict=True)
    )
    null = []
    for swap in swaps:
        of_vision, of_text = swap[states.vision_sample], swap[states.text_sample]
        null += [
            frechet_distance(
                torch.cat([vision[~of_vision], text[of_text]]) * by, torch.cat([text[~of_text], vision[of_vision]]) * by
            )
            for vision, text, by in zip(states.vision, states.text, scale, strict=True)
        ]
    return math.log10(real / (math.fsum(null) / NULL_DRAWS))


def _neighbours_kept(one: Tensor, other: Tensor, most: int = 1000) -> float:
    """Mean share of a row's nearest neighbours by cosine that it has in both spaces."""
    step = max(1, len(one) // most)
    nearest = []
    for rows in (one[::step], other[::step]):
        centred = rows - rows.mean(dim=0)
        normed = centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-12)
        nearness = normed @ normed.T
        nearness.fill_diagonal_(-2)
        nearest.append(
            torch.zeros_like(nearness, dtype=torch.bool).scatter_(1, nearness.topk(NEIGHBOURS).indices, True)
        )
    return float((nearest[0] & nearest[1]).sum(dim=1).double().mean()) / NEIGHBOURS


def _sample_means(rows: Tensor, sample: Tensor) -> Tensor:
    count = int(sample.max()) + 1
    totals = torch.zeros(count, rows.shape[1], dtype=rows.dtype).index_add_(0, sample, rows)
    return totals / torch.bincount(sample, minlength=count)[:, None]
