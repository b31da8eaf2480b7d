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
from tests.matrix.worker import unsharded
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
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
    ), processor


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


class Training:
    """Steps on one batch."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.losses = model, []
        self._words = processor.tokenizer(["a few words", "the text"], return_tensors="pt", padding=True)
        self._optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)

    def step(self) -> None:
        loss = self.model(**self._words, labels=self._words.input_ids).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.losses.append(loss.item())


@contextmanager
def failing(model: Any) -> Iterator[None]:
    """The forward fails in its second layer."""

    def fail(*_: Any) -> None:
        raise RuntimeError("a layer fails")

    handle = layers_of(getattr(model, "vlm", model))[1].register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def prefetch(model: nn.Module) -> None:
    """Each layer gathers the next one while it runs, as users with many GPUs have it."""
    layers = [each for each in model.modules() if hasattr(each, "set_modules_to_forward_prefetch")]
    for first, second in zip(layers[1:], layers[2:], strict=False):
        first.set_modules_to_forward_prefetch([second])


def case(build: Any) -> dict[str, Any]:
    """Evaluated before the first step and later, with all gathered by others, and when a forward fails."""
    plain = Training(*build())
    for _ in range(4):
        plain.step()
    model, processor = build()
    training, target = Training(model, processor), getattr(model, "vlm", model)
    prefetch(model)
    found: dict[str, Any] = {"plain": plain.losses, "values": [], "errors": [], "left": []}

    def evaluate() -> None:
        try:
            found["values"].append(evaluate_mir(target, PROBE, processor=processor, batch_size=2).mir)
        except ForwardError as error:
            found["errors"].append(str(error))
        found["left"].append(unsharded(model))

    for _ in range(4):
        evaluate()
        with failing(model):
            evaluate()
        for each in model.modules():
            if hasattr(each, "unshard"):
                each.unshard()
        found["left by others"] = unsharded(model)
        evaluate()
        training.step()
    found["losses"] = training.losses
    return found


def main(folder: str, *names: str) -> None:
    """The set-ups of these names."""
    dist.init_process_group("gloo")
    write_rank(folder, dist.get_rank(), {name: case(SETUPS[name]) for name in names})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
