# SPDX-License-Identifier: Apache-2.0
"""What is known of each family of models: how to build a tiny one, its own markup, or why it is refused.

A new family is one more :class:`Family` in the list FAMILIES of one of the files beside this one.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

NO_ENTRIES = ("conftest", "parts", "registry", "reference", "torchvision_ops", "run")


@dataclass(frozen=True)
class Family:
    """One family, or a variant of it.

    Attributes:
        name: as in transformers' mapping of models that turn images and text into text, with a variant in brackets.
        make: builds a tiny model with random weights, in float32, and its real processor; the same each time.
        prompt: what goes to the processor for one image and one text: the family's own markup with its placeholder,
            and {text}. Written out here, so that the reference decides nothing itself. Of a family that is refused: "".
        encode: for processors that take images and a prompt in another way than `processor(images=[images],
            text=[prompt], return_tensors="pt")`: called as encode(processor, images, prompt), returns model inputs.
        vision: the ids of vision tokens, from the model's config; None for `config.image_token_id`.
        vision_at: for families without such ids: the (1, S) mask of vision positions in the model inputs.
        states: finds the hidden states of the decoder (embedding and layers) in the model's outputs.
        refused: a part of the message with which the family is refused; empty if it is measured.
        one_image: a part of the message with which samples of several images are refused; empty if they are measured.
        alone: samples can't share a batch without changing one another.
        trains: two steps of a Trainer run on a CPU.
        short: part of `make test`, not only of `make test-all`. Must not need torchvision.
        note: what is special, in a few words, for docs/models.md.
    """

    name: str
    make: Callable[[], tuple[nn.Module, Any]]
    prompt: str = ""
    encode: Callable[[Any, Any, str], dict[str, Any]] | None = None
    vision: Callable[[Any], tuple[int, ...]] | None = None
    vision_at: Callable[[dict[str, Any]], Any] | None = None
    states: Callable[[Any], Any] | None = None
    refused: str = ""
    one_image: str = ""
    alone: bool = False
    trains: bool = True
    short: bool = False
    note: str = ""

    def build(self) -> tuple[nn.Module, Any]:
        """The model, with varied norms, and its processor."""
        model, processor = self.make()
        return varied(model), processor


@torch.no_grad()
def varied(model: Any) -> Any:
    """The model with norms that scale each channel differently, as trained ones do.

    After a last norm of ones all rows are equally long to about 1e-6, and rounding decides which of them are outliers.
    """
    for name, weight in model.named_parameters():
        if "norm" in name and weight.ndim == 1:
            weight += 0.3 * torch.rand_like(weight)
    return model


def families() -> list[Family]:
    """All entries, by name."""
    found: list[Family] = []
    for each in pkgutil.iter_modules(importlib.import_module(__package__).__path__):
        if each.name not in NO_ENTRIES and not each.name.startswith("test_"):
            found += importlib.import_module(f"{__package__}.{each.name}").FAMILIES
    return sorted(found, key=lambda family: family.name)
