# SPDX-License-Identifier: Apache-2.0
"""One rank of a mesh that evaluates models split over ranks, and ones that are refused: `mesh_worker FOLDER`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlavaForConditionalGeneration
from transformers.distributed import DistributedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mir_callback import Probe, evaluate_mir
from tests import tiny_models
from tests.distributed.launch import write_rank
from tests.samples import pairs

COUNTS = (7, 1)  # samples: more than ranks, and fewer


def value(model: Any, processor: Any, count: int) -> dict[str, Any]:
    """One evaluation, also called by the test itself on a single process."""
    probe = Probe.from_pairs(pairs(count), matched=True)
    return evaluate_mir(model, probe, processor=processor, batch_size=2, vision_gain=count > 1).to_fields()


def split_layers(model: Any, mesh: DeviceMesh) -> Any:
    """Tensor parallelism of torch on the decoder layers, as a user writes it."""
    plan: dict[str, Any] = {
        **dict.fromkeys(
            [f"self_attn.{name}_proj" for name in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"], ColwiseParallel()
        ),
        **dict.fromkeys(["self_attn.o_proj", "mlp.down_proj"], RowwiseParallel()),
    }
    for layer in model.model.language_model.layers:
        parallelize_module(layer, mesh, plan)
    return model


def by_transformers(model: Any, folder: str) -> Any:
    """Tensor parallelism of transformers, over FSDP2 on more than two ranks."""
    config = DistributedConfig(tp_size=2, fsdp_size=dist.get_world_size() // 2)
    return LlavaForConditionalGeneration.from_pretrained(folder, distributed_config=config, dtype=torch.float32)


def by_torch(model: Any, folder: str) -> Any:
    """Tensor parallelism of torch; the output embeddings return a DTensor of part of the vocabulary."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replicas", "rows"))["rows"]
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel(use_local_output=False)})
    return split_layers(model, mesh)


def by_torch_and_fsdp(model: Any, folder: str) -> Any:
    """The same below FSDP2, on a mesh whose other dimension comes last; the output embeddings gather."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("tp", "dp"))
    parallelize_module(model, mesh["tp"], {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    for layer in split_layers(model, mesh["tp"]).model.language_model.layers:
        fully_shard(layer, mesh=mesh["dp"])
    return fully_shard(model, mesh=mesh["dp"])


def by_fsdp(model: Any, folder: str) -> Any:
    """FSDP2 over all ranks: data-parallel ones."""
    return fully_shard(model)


GOOD: dict[str, Callable[[Any, str], Any]] = {
    each.__name__: each for each in (by_transformers, by_torch, by_torch_and_fsdp, by_fsdp)
}


def part_of_vocabulary(model: Any) -> Any:
    """The logits of each rank are of its own tokens only."""
    return parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), {"lm_head": ColwiseParallel()})


def halves_apart(model: Any) -> Any:
    """Nothing says what the two halves of the ranks have to do with each other."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("secret", "dp"))
    return fully_shard(model, mesh=mesh["dp"])


def split_on_rank_0(model: Any) -> Any:
    """The other ranks of the mesh have the whole model."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    split = split_layers(model, mesh)
    return split if dist.get_rank() == 0 else tiny_models.llava()[0]


def last_stage(model: Any) -> Any:
    """A stage of a pipeline with a part of the layers."""
    del model.model.language_model.layers[0]
    return model


def deepspeed_pipeline(model: Any) -> Any:
    """DeepSpeed's own pipeline."""
    from deepspeed.pipe import PipelineModule

    layers = [nn.Linear(4, 4) for _ in range(dist.get_world_size())]
    return PipelineModule(layers, num_stages=dist.get_world_size(), loss_fn=nn.MSELoss())


def unknown_split(model: Any) -> Any:
    """Attention replaced by a function of some package for sequence parallelism."""

    def ulysses_attention(*_: Any, **__: Any) -> None:
        raise AssertionError("called")

    ALL_ATTENTION_FUNCTIONS["sdpa"] = ulysses_attention
    return model


BAD: dict[str, Callable[[Any], Any]] = {
    each.__name__: each
    for each in (part_of_vocabulary, halves_apart, split_on_rank_0, last_stage, deepspeed_pipeline, unknown_split)
}


def outcome(case: Callable[[Any], Any]) -> str:
    """The error a case ended with, and whether the model was called before it."""
    model, processor = tiny_models.llava()
    called = []
    model.model.vision_tower.register_forward_pre_hook(lambda *_: called.append(True))
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    split = case(model)
    try:
        value(split, processor, 4)
    except Exception as error:
        return f"{type(error).__name__}: {error}{' (after a forward)' if called else ''}"
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    return "no error"


def main(folder: str) -> None:
    """Run every case; after a bad one the ranks must still be in step for the next."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    model, processor = tiny_models.llava()
    saved = str(Path(folder) / "model")
    if dist.get_rank() == 0:
        model.save_pretrained(saved)
    dist.barrier()
    bad = {name: outcome(case) for name, case in BAD.items()}
    good = {}
    for name, split in GOOD.items():
        on_ranks = split(tiny_models.llava()[0], saved)
        good[name] = [value(on_ranks, processor, count) for count in COUNTS]
    write_rank(folder, dist.get_rank(), {"good": good, "bad": bad})


if __name__ == "__main__":
    main(*sys.argv[1:])
