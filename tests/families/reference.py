# SPDX-License-Identifier: Apache-2.0
"""MIR of a family's model without any of our code: one sample at a time, from `output_hidden_states`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tests.families.registry import Family
from tests.reference import rate


def encode(family: Family, processor: Any, sample: Sequence[Any]) -> dict[str, Any]:
    """One sample, its images and texts in order, as inputs of the model, with the markup that the registry writes."""
    mark = family.prompt.replace("{text}", "")
    prompt = "".join(part if isinstance(part, str) else mark for part in sample)
    images = [part for part in sample if not isinstance(part, str)]
    if family.encode is not None:
        return dict(family.encode(processor, images, prompt))
    return dict(processor(images=[images], text=[prompt], return_tensors="pt"))


@torch.no_grad()
def mir_of(family: Family, model: Any, processor: Any, samples: Sequence[Sequence[Any]]) -> float:
    """MIR in float64 over hidden states that the model itself returns, without the embedding's."""
    model.eval()
    vision, text = [], []
    for sample in samples:
        inputs = encode(family, processor, sample)
        outputs = model(**inputs, output_hidden_states=True)
        states = (family.states(outputs) if family.states is not None else outputs.hidden_states)[1:]
        if family.vision_at is not None:
            is_vision = family.vision_at(inputs)[0].bool()
        else:
            ids = family.vision(model.config) if family.vision is not None else (model.config.image_token_id,)
            is_vision = torch.isin(inputs["input_ids"][0], torch.tensor(ids))
        last = int(is_vision.nonzero()[-1])
        assert states[0].shape[:2] == (1, len(is_vision)), "hidden states are not those of the input's positions"
        vision.append([state[0, is_vision] for state in states])
        text.append([state[0, last + 1 :] for state in states])
    layers = [[torch.cat(layer) for layer in zip(*rows, strict=True)] for rows in (vision, text)]
    return rate(*layers)[0]
