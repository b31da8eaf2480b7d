# SPDX-License-Identifier: Apache-2.0
"""One of two ranks that measure samples of any layout with sharded weights: `layouts_worker FOLDER CASE`."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from mir_callback import MIRCallback, Probe, evaluate_mir
from mir_callback.config import MIRConfig
from mir_callback.evaluation.evaluate import Evaluator
from mir_callback.probe.adapters import HuggingFaceAdapter
from tests import tiny_models
from tests.distributed.launch import write_rank
from tests.distributed.train_worker import deepspeed_config
from tests.layouts import mixed
from tests.samples import pairs
from tests.training.runs import make_trainer


class OneByOne(nn.Module):
    """A part that is called for each image, as the towers of some families are."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """The part's output for all images."""
        return torch.cat([self.part(row) for row in states.split(1)])


def unlike_calls() -> tuple[Any, Any, Probe]:
    """A model with such a part, its processor, and samples of one to three images."""
    model, processor = tiny_models.llava()
    layer = model.model.vision_tower.encoder.layers[0]
    layer.mlp = OneByOne(layer.mlp)
    found = pairs(4)
    samples = [[*[image] * (1, 3, 2, 1)[index], text] for index, (image, text) in enumerate(found)]
    return model, processor, Probe.from_samples(samples)


class Either(nn.Module):
    """Two parts of the same shape, of which the length of a sample decides once ``routed`` is set."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList([part, copy.deepcopy(part)])
        self.routed = False
        with torch.no_grad():
            for weight in self.parts[1].parameters():
                weight.mul_(-1.0)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """The output of one of them."""
        return self.parts[states.shape[1] % 2 if self.routed else 0](states)


def routed() -> tuple[Any, Either, Evaluator]:
    """A model with such parts, these, and an evaluator of one sample at a time."""
    model, processor = tiny_models.llava()
    layer = model.model.language_model.layers[1]
    layer.mlp = Either(layer.mlp)
    if dist.is_initialized():
        for module in (*layer.mlp.parts, model):
            fully_shard(module)
    probe, config = Probe.from_pairs(pairs(6)), MIRConfig(batch_size=1)
    return model, layer.mlp, Evaluator(model, probe, HuggingFaceAdapter(model, processor), config)


def values_while_routed() -> list[float]:
    """Before samples take other parts, while they do, and once more."""
    model, either, evaluator = routed()
    values = []
    for either.routed in (False, True, True):
        values.append(evaluator.evaluate(model).mir)
    return values


def evaluated() -> list[float]:
    """Evaluations under FSDP2 of a model with a part that is called for each image, with batches and without."""
    values = []
    for batch_size in (2, 1):
        model, processor, probe = unlike_calls()
        for module in (model.model.vision_tower.encoder.layers[0].mlp.part, model):
            fully_shard(module)
        values.append(evaluate_mir(model, probe, processor=processor, batch_size=batch_size).mir)
    return values


def trained(folder: str) -> list[dict[str, Any]]:
    """The values measured while training under ZeRO-3."""
    trainer = make_trainer(Path(folder) / "run", deepspeed=deepspeed_config("3"), ddp_backend="gloo", steps=2)
    adapter = HuggingFaceAdapter(trainer.model, trainer.processing_class)
    probe = Probe.from_samples(mixed(8))  # without an order of their own, ranks would get other modalities at a time
    callback = MIRCallback(probe, adapter=adapter, every=1, batch_size=1, text_only="count").attach(trainer)
    trainer.train()
    return [record.to_dict() for record in callback.history]


if __name__ == "__main__":
    if sys.argv[2] == "trained":
        found: Any = trained(sys.argv[1])
    else:
        dist.init_process_group("gloo")
        found = {"one by one": evaluated(), "routed": values_while_routed()}
    write_rank(sys.argv[1], dist.get_rank(), found)
    dist.destroy_process_group()  # left open, it may abort the process at its exit
