# SPDX-License-Identifier: Apache-2.0
"""One rank of a mesh that evaluates models split over ranks, and ones that are refused: `mesh_worker FOLDER [few]`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate.big_modeling import _attach_context_parallel_hooks
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlavaForConditionalGeneration, Qwen3MoeConfig
from transformers.distributed import DistributedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mir_callback import Probe, evaluate_mir
from mir_callback.config import MIRConfig
from mir_callback.evaluation.evaluate import Evaluator
from mir_callback.evaluation.forward import waits_for_ranks
from mir_callback.probe.adapters import find_adapter
from tests import tiny_models
from tests.distributed.launch import write_rank
from tests.model.packed_attention import PackedTrainingAttention, single_lengths_forward
from tests.samples import pairs

COUNTS = (7, 1)  # samples: more than ranks, and fewer


def mixture() -> tuple[Any, Any]:
    """LLaVA with a mixture of experts."""
    model, processor = tiny_models.llava()
    sizes = {name: getattr(model.config.text_config, name) for name in ("vocab_size", "hidden_size", "pad_token_id")}
    text = Qwen3MoeConfig(
        **sizes,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    )
    model.config.text_config = text
    return LlavaForConditionalGeneration(model.config), processor


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


def by_transformers_fsdp(model: Any, folder: str) -> Any:
    """FSDP2 of transformers over all ranks."""
    config = DistributedConfig(fsdp_size=dist.get_world_size())
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


def by_fsdp_and_packed(model: Any, folder: str) -> Any:
    """FSDP2 of layers whose attention was replaced for packed sequences."""
    for layer in model.model.language_model.layers:
        layer.self_attn.__class__ = PackedTrainingAttention
        fully_shard(layer)
    return fully_shard(model)


def by_experts(model: Any, folder: str) -> Any:
    """Expert parallelism of transformers over all ranks, beside tensor parallelism."""
    world = dist.get_world_size()
    config = DistributedConfig(tp_size=2, fsdp_size=world // 2, ep_size=world)
    return LlavaForConditionalGeneration.from_pretrained(
        f"{folder} moe", distributed_config=config, dtype=torch.float32
    )


def by_deepspeed(model: Any, folder: str) -> Any:
    """Tensor parallelism of DeepSpeed's engine."""
    return initialize(model, {"tensor_parallel": {"autotp_size": 2}})


def by_ulysses(model: Any, folder: str) -> Any:
    """Sequences that DeepSpeed's Ulysses splits over ranks in training, as accelerate sets it up."""
    groups = UlyssesSPAttentionHF.register_with_transformers(
        model, core_attn_implementation="sdpa", sequence_parallel_size=2, micro_batch_size=2
    )
    return initialize(model, {"sequence_parallel_size": 2}, mpu=groups)


def by_context_parallelism(model: Any, folder: str) -> Any:
    """Accelerate's hooks for context parallelism, which drop the attention masks."""
    _attach_context_parallel_hooks(model)
    return model


def initialize(model: Any, config: dict[str, Any], **options: Any) -> Any:
    """A DeepSpeed engine."""
    config |= {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    config |= {"zero_allow_untested_optimizer": True}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, **options)[0]


GOOD: dict[str, Callable[[Any, str], Any]] = {
    each.__name__: each
    for each in (
        by_transformers,
        by_transformers_fsdp,
        by_torch,
        by_torch_and_fsdp,
        by_fsdp,
        by_fsdp_and_packed,
        by_experts,
        by_deepspeed,
        by_context_parallelism,
        by_ulysses,
    )
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
    layers = [nn.Linear(4, 4) for _ in range(dist.get_world_size())]
    return PipelineModule(layers, num_stages=dist.get_world_size(), loss_fn=nn.MSELoss())


def own_weights(model: Any) -> Any:
    """Each rank trains a model of its own, as where a loop forgets to wrap it."""
    return tiny_models.llava(seed=dist.get_rank())[0]


def replicas_of_parts(model: Any) -> Any:
    """DDP over tensor parallelism, of which the inner model is given."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    split_layers(model, mesh["tp"])
    DistributedDataParallel(model, device_mesh=mesh["dp"])
    return model


def unknown_split(model: Any) -> Any:
    """Attention replaced by a function of some package for sequence parallelism."""

    def ulysses_attention(*_: Any, **__: Any) -> None:
        raise AssertionError("called")

    ALL_ATTENTION_FUNCTIONS["sdpa"] = ulysses_attention
    return model


def several_sequences(model: Any) -> Any:
    """Attention that takes every token for a sequence."""
    for layer in model.model.language_model.layers:
        layer.self_attn.forward = MethodType(single_lengths_forward, layer.self_attn)
    return fully_shard(model)


BAD: dict[str, Callable[[Any], Any]] = {
    each.__name__: each
    for each in (
        part_of_vocabulary,
        halves_apart,
        split_on_rank_0,
        last_stage,
        deepspeed_pipeline,
        own_weights,
        replicas_of_parts,
        unknown_split,
        several_sequences,
    )
}


FEW = {"by_transformers", "by_torch", "halves_apart"}


def outcome(case: Callable[[Any], Any], step: Any = contextlib.nullcontext) -> str:
    """The error a case ended with, and whether the model was called before it."""
    model, processor = tiny_models.llava()
    called = []
    model.model.vision_tower.register_forward_pre_hook(lambda *_: called.append(True))
    attention = ALL_ATTENTION_FUNCTIONS["sdpa"]
    try:
        with step():
            value(case(model), processor, 4)
    except Exception as error:
        return f"{type(error).__name__}: {error}{' (after a forward)' if called else ''}"
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    return "no error"


def split_afterwards(model: Any, processor: Any) -> str:
    """The error of an evaluation whose model has been split since the probe was encoded for it."""
    probe = Probe.from_pairs(pairs(4))
    evaluator = Evaluator(model, probe, find_adapter(model, processor), MIRConfig())
    split_layers(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    try:
        evaluator.evaluate(model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main(folder: str, which: str = "all") -> None:
    """Run every case, or a `few` of them; after a bad one the ranks must still be in step for the next."""
    deepspeed.init_distributed("gloo")
    saved = f"{folder}/model"
    if dist.get_rank() == 0:
        tiny_models.llava()[0].save_pretrained(saved)
        mixture()[0].save_pretrained(f"{saved} moe")
    dist.barrier()
    bad = {name: outcome(case) for name, case in BAD.items() if which == "all" or name in FEW}
    if which == "all":
        bad["split_afterwards"] = split_afterwards(*tiny_models.llava())
        mesh, world = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_world_size()
        batch = {"buffers": [torch.zeros(1, 8 * world)], "buffer_seq_dims": [1]}
        bad["inside_context_parallel"] = outcome(lambda model: model, lambda: context_parallel(mesh, **batch))
    good, attention = {}, ALL_ATTENTION_FUNCTIONS["sdpa"]
    for name, split in GOOD.items():
        if which == "few" and name not in FEW:
            continue
        model, processor = tiny_models.llava()
        processor.tokenizer.padding_side = "left"  # then a mask that is lost shows in the value
        on_ranks = split(model, saved)
        hooks = [list(module._forward_pre_hooks) for module in on_ranks.modules()]
        assert waits_for_ranks(on_ranks) == (split not in (by_ulysses, by_context_parallelism))
        good[name] = [value(on_ranks, processor, count) for count in COUNTS]
        assert [list(module._forward_pre_hooks) for module in on_ranks.modules()] == hooks
        assert (ALL_ATTENTION_FUNCTIONS["sdpa"] is attention) == (split is not by_ulysses)
    write_rank(folder, dist.get_rank(), {"good": good, "bad": bad})


if __name__ == "__main__":
    main(*sys.argv[1:])
