# SPDX-License-Identifier: Apache-2.0
"""One of two ranks that evaluates FSDP models in many states: `fsdp_worker FOLDER`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from mir_callback import Probe, evaluate_mir
from mir_callback.errors import ForwardError
from tests import tiny_models
from tests.distributed.launch import write_rank
from tests.samples import pairs

PROBE = Probe.from_pairs(pairs(5))


class Outer(nn.Module):
    """A model within another module, as loops of one's own have it."""

    def __init__(self, vlm: nn.Module) -> None:
        super().__init__()
        self.vlm = vlm

    def forward(self, **inputs: Any) -> Any:
        return self.vlm(**inputs)


def layers_of(model: Any) -> list[nn.Module]:
    return [*model.model.language_model.layers, *model.model.vision_tower.encoder.layers]


def shard(**options: Any) -> tuple[Any, Any]:
    """A LLaVA under FSDP2, sharded layer by layer."""
    model, processor = tiny_models.llava()
    for layer in layers_of(model):
        fully_shard(layer, **options)
    return fully_shard(model, **options), processor


def within() -> tuple[Any, Any]:
    model, processor = tiny_models.llava()
    for layer in layers_of(model):
        fully_shard(layer)
    return fully_shard(Outer(fully_shard(model))), processor


def first_version() -> tuple[Any, Any]:
    model, processor = tiny_models.llava()
    policy = ModuleWrapPolicy({type(layer) for layer in layers_of(model)})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")), processor


def mesh(*sizes: int) -> Any:
    return init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard")[-len(sizes) :])


LOW = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
SETUPS = {
    "FSDP2": shard,
    "FSDP2, kept after forward": lambda: shard(reshard_after_forward=False),
    "HSDP, 1 x 2": lambda: shard(mesh=mesh(1, 2)),
    "HSDP, 2 x 1": lambda: shard(mesh=mesh(2, 1)),
    "bfloat16": lambda: shard(mp_policy=MixedPrecisionPolicy(**LOW)),
    "CPU offload": lambda: shard(offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "within another module": within,
    "FSDP1": first_version,
}


def unsharded(model: nn.Module) -> int:
    """How many weights are not in their shards."""
    left = sum(not hasattr(each, "_local_tensor") for each in model.parameters())
    wrappers = [each for each in model.modules() if isinstance(each, FullyShardedDataParallel)]
    if not wrappers:
        return left
    flats = [each._handle.flat_param for each in wrappers if each._handle is not None]
    return sum(getattr(flat, "_full_param_padded", flat.new_zeros(0)).untyped_storage().size() > 0 for flat in flats)


def train(model: Any, processor: Any, steps: int) -> list[float]:
    """A few steps on one batch; the losses."""
    words = processor.tokenizer(["a few words", "the text"], return_tensors="pt", padding=True)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**words, labels=words.input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@contextmanager
def failing(layer: nn.Module) -> Iterator[None]:
    """The forward fails in this layer."""

    def fail(*_: Any) -> None:
        raise RuntimeError("a layer fails")

    handle = layer.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def evaluate(found: dict[str, Any], name: str, model: Any, processor: Any) -> None:
    target = getattr(model, "vlm", model)
    try:
        found[name] = evaluate_mir(target, PROBE, processor=processor, batch_size=2).mir
    except ForwardError as error:
        found[name] = str(error)
    found[f"{name}, unsharded"] = unsharded(model)


def case(build: Any) -> dict[str, Any]:
    """Evaluated before the first step, with all gathered by others, after a failure, and again; trained in between."""
    plain = build()
    losses = train(*plain, 4)
    model, processor = build()
    found: dict[str, Any] = {"plain losses": losses}
    evaluate(found, "before the first step", model, processor)
    with failing(layers_of(getattr(model, "vlm", model))[1]):
        evaluate(found, "failed before the first step", model, processor)
    found["losses"] = train(model, processor, 2)
    fsdp2 = [each for each in model.modules() if hasattr(each, "unshard")]
    for each in fsdp2:
        each.unshard()
    found["left by others"] = unsharded(model)
    evaluate(found, "left by others", model, processor)
    with failing(layers_of(getattr(model, "vlm", model))[1]):
        evaluate(found, "failed", model, processor)
    evaluate(found, "again", model, processor)
    return found


def main(folder: str) -> None:
    """Every set-up."""
    dist.init_process_group("gloo")
    write_rank(folder, dist.get_rank(), {name: case(build) for name, build in SETUPS.items()})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
