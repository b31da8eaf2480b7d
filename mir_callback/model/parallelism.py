# SPDX-License-Identifier: Apache-2.0
"""Which ranks share samples, found from the model itself; what can't be measured is refused before any forward.

Ranks that compute one forward together, each with a part of the weights (tensor and expert parallelism), must forward
the same samples. All other ranks are data-parallel ones and forward samples of their own. That includes ranks that
split sequences in training (context parallelism, Ulysses): in an evaluation each forwards whole sequences.

Nothing is imported for this: a framework that is not loaded has not split anything.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mir_callback import distributed
from mir_callback.errors import ConfigError, UnsupportedModelError
from mir_callback.model.decoder import unwrap
from mir_callback.model.sharding import is_fsdp1, is_shard

_SPLIT_WORDS = ("ulysses", "sequence_parallel", "context_parallel", "ring_flash", "ring_attn", "zigzag")
_DDP_OVER_TENSORS = "torch.distributed.tensor.parallel.ddp._reconstruct_dtensor"
_WEIGHTS_COMPARED = 16
_INSTEAD = "Evaluate its checkpoints with `mir eval` instead."


@dataclass(frozen=True)
class SampleShare:
    """The part of the probe that a rank forwards: samples part, part + parts, ... Ranks of one part share them."""

    part: int = 0
    parts: int = 1
    leads: bool = True  # the rank of this part that keeps the rows, so that each is counted once


@dataclass(frozen=True)
class RankGroups:
    """What a rank knows of its groups, as (name, ranks)."""

    model: frozenset[tuple[str, tuple[int, ...]]]  # ranks that compute one forward together
    data: frozenset[tuple[str, tuple[int, ...]]]  # ranks between which a wrapper exchanges gradients, as far as known


def find_share(model: nn.Module) -> SampleShare:
    """The samples that this rank forwards, from the parallelism of a model, bare or wrapped.

    Raises UnsupportedModelError, on every rank, for what can't be measured: decoder layers on other ranks (pipeline
    parallelism), attention that splits sequences in an unknown way, groups that contradict one another or leave open
    which ranks share samples, ranks that hold different weights. Ranks: collective.
    """
    error, own = None, None
    try:
        refuse_unmeasurable(model)
        own = find_groups(model), _measure_weights(model)
    except Exception as caught:
        error = caught
    groups, weights = zip(*distributed.sync_errors(error, own), strict=True)
    share = assign_share(groups, distributed.rank())
    if share.parts == len(groups):
        _require_same_weights(weights)
    return share


def assign_share(everyone: Sequence[RankGroups], rank: int) -> SampleShare:
    """The share of ``rank``, from the groups of every rank. Ranks: pure, with the same error on every rank."""
    for member, groups in enumerate(everyone):
        for name, ranks in groups.model:
            for other in ranks:
                if (name, ranks) not in everyone[other].model:
                    raise UnsupportedModelError(
                        f"rank {member} shares its model with ranks {list(ranks)} ({name}), but rank {other} does not "
                        "say so. Split the model alike on every rank."
                    )
    model = [ranks for groups in everyone for _, ranks in groups.model]
    data = {group for groups in everyone for group in groups.data}
    apart = _connect([*model, *(ranks for _, ranks in data)], len(everyone))
    if data and len(set(apart)) > 1:
        pieces = [[each for each, first in enumerate(apart) if first == leader] for leader in sorted(set(apart))]
        raise UnsupportedModelError(
            f"MIR can't tell which ranks share samples: ranks {' and '.join(map(str, pieces))} exchange neither "
            f"weights nor gradients with one another, as far as the model's wrapper shows ({_names(data)}). {_INSTEAD}"
        )
    leaders = _connect(model, len(everyone))
    parts = sorted(set(leaders))
    return SampleShare(parts.index(leaders[rank]), len(parts), leaders[rank] == rank)


def _measure_weights(model: nn.Module) -> dict[str, float]:
    """Norms of some weights that this rank holds whole, of trained ones if there are; none under ZeRO-3 and FSDP."""
    if distributed.world_size() == 1 or any(is_fsdp1(each) for each in model.modules()):
        return {}
    whole = [
        (name, each)
        for name, each in model.named_parameters()
        if each.is_floating_point() and not (each.is_meta or is_shard(each))
    ]
    trained = [(name, each) for name, each in whole if each.requires_grad] or whole
    chosen = trained[:: max(1, len(trained) // _WEIGHTS_COMPARED)]
    return {name: torch.linalg.vector_norm(each.detach(), dtype=torch.float64).item() for name, each in chosen}


def _require_same_weights(everyone: Sequence[Mapping[str, float]]) -> None:
    """Refuse ranks that train models of their own. Ranks: pure, with the same error on every rank."""
    for rank, weights in enumerate(everyone):
        for name, norm in weights.items():
            first = everyone[0].get(name, norm)
            if math.isfinite(norm) and math.isfinite(first) and not math.isclose(norm, first, rel_tol=1e-6):
                raise UnsupportedModelError(
                    f"Ranks hold different weights: the norm of {name} is {first:.6g} on rank 0 and {norm:.6g} on rank "
                    f"{rank}. MIR of such a mixture means nothing. Is the model wrapped in DDP or FSDP, or prepared by "
                    "Accelerate, and its wrapper used for the forwards of training?"
                )


def find_groups(model: nn.Module) -> RankGroups:
    """This rank's groups. Ranks: any; no communication."""
    together: set[tuple[str, tuple[int, ...]]] = set()
    data: set[tuple[str, tuple[int, ...]]] = set()
    gathered = _gathered_weights(model)
    every: list[Any] = list(model.modules())
    for module in every:
        kind, package = type(module).__name__, type(module).__module__.partition(".")[0]
        if kind in ("DistributedDataParallel", "FullyShardedDataParallel") and package == "torch":
            for group in (module.process_group, getattr(module, "_inter_node_pg", None)):
                data |= {(kind, distributed.ranks_of(group))} if group is not None else set()
        elif package == "deepspeed":
            if getattr(module, "mp_group", None) is not None:
                together.add(("DeepSpeed's tensor parallelism", distributed.ranks_of(module.mp_group)))
            group = getattr(module, "seq_data_parallel_group", None)
            data |= {(f"{kind}'s data-parallel group", distributed.ranks_of(group))} if group is not None else set()
        for name, parameter in module._parameters.items():
            synced = {
                (f"FSDP on {_describe(mesh)}", ranks)
                for mesh, groups in gathered.get((id(module), name), ())
                for ranks in map(distributed.ranks_of, groups)
            }
            data |= synced
            together |= _sharded_over(parameter, {ranks for _, ranks in synced})
    top: Any = unwrap(model)
    mesh = getattr(top, "_device_mesh", None)
    if (getattr(top, "_tp_size", None) or 1) > 1 and mesh is not None:  # older transformers: not DTensors everywhere
        names = mesh.mesh_dim_names or ()
        if "tp" in names or mesh.ndim == 1:
            together.add(("tp", _ranks_along(mesh, names.index("tp") if "tp" in names else 0)))
    megatron = _megatron()
    if megatron is not None:
        together.add(
            ("Megatron's tensor parallelism", distributed.ranks_of(megatron.get_tensor_model_parallel_group()))
        )
    return RankGroups(frozenset(each for each in together if len(each[1]) > 1), frozenset(data))


@contextmanager
def whole_sequences(model: nn.Module) -> Iterator[None]:
    """Inside, attention works on whole sequences, also if it splits them over ranks in training.

    Raises ConfigError inside torch's `context_parallel`, which is meant for a training step. Ranks: any.
    """
    if _is_split(torch.nn.functional.scaled_dot_product_attention):
        raise ConfigError(
            "MIR can't be evaluated inside context_parallel(...), which splits the sequences of one training step: "
            "leave it before the monitor is called"
        )
    with ExitStack() as restored:
        functions, whole = _whole_attention()
        for name, function in whole.items():
            restored.callback(functions.__setitem__, name, functions[name])
            functions[name] = function
        for module in model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs):
                restored.callback(_put_back, hooks, dict(hooks))  # DeepSpeed's check of the first batch removes itself
            for key, hook in list(module._forward_pre_hooks.items()):
                if _is_of_accelerate(hook):  # it drops attention masks, which padded sequences need
                    del module._forward_pre_hooks[key]
        yield


def _put_back(hooks: dict[int, Any], before: dict[int, Any]) -> None:
    if list(hooks) != list(before):
        hooks.clear()
        hooks.update(before)


def refuse_unmeasurable(model: nn.Module) -> None:
    """UnsupportedModelError, by name, for decoder layers, experts or parts of sequences that only other ranks have.

    Ranks: any; no communication.
    """
    _whole_attention()
    for module in model.modules():
        kind, package = type(module), type(module).__module__.partition(".")[0]
        if {"PipelineModule", "PipelineEngine"} & {each.__name__ for each in kind.__mro__}:
            raise _elsewhere(f"a {kind.__name__}")
        if getattr(module, "_pp_stage", None) is not None:
            stage: Any = module._pp_stage
            raise _elsewhere(f"stage {stage.pp_rank + 1} of {stage.pp_size}")
        if package == "deepspeed" and (getattr(module, "ep_size", None) or 1) > 1:
            raise UnsupportedModelError(
                f"MIR can't be measured with DeepSpeed's expert parallelism: {kind.__name__} sends tokens to experts "
                f"on {module.ep_size} ranks and drops some by what else is in the batch. {_INSTEAD}"
            )
        if package == "deepspeed" and kind.__name__ == "DistributedAttention":
            raise _split_by(f"{kind.__module__}.{kind.__name__}")
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        for hook in hooks:
            if _name_of(hook) == _DDP_OVER_TENSORS:
                raise UnsupportedModelError(
                    "MIR can't be measured under DDP over tensor parallelism, DDP(model, device_mesh=...): its forward "
                    f"takes the weights out of their modules. Use fully_shard on that mesh instead. {_INSTEAD}"
                )
            if _is_split(hook) and not _is_of_accelerate(hook):
                raise _split_by(_name_of(hook))
    megatron = _megatron()
    for name in ("pipeline_model", "context", "expert_model") if megatron is not None else ():
        size = getattr(megatron, f"get_{name}_parallel_world_size", lambda: 1)()
        if size > 1:
            raise UnsupportedModelError(
                f"MIR can't be measured under Megatron's {name.partition('_')[0]} parallelism of size {size}: only "
                f"its tensor and data parallelism are supported. {_INSTEAD}"
            )


def _elsewhere(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"MIR can't be measured under pipeline parallelism: the model is {what}, and the other decoder layers are on "
        f"other ranks. {_INSTEAD}"
    )


def _split_by(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"MIR can't be measured while {what} splits sequences over ranks: it needs whole sequences, and knows only how "
        f"to get them under accelerate's and DeepSpeed's (UlyssesSPAttentionHF). {_INSTEAD}"
    )


def _whole_attention() -> tuple[Any, dict[str, Callable[..., Any]]]:
    """The attention functions of transformers and, for those that split sequences, what they have replaced."""
    functions: Any = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", {})
    whole: dict[str, Callable[..., Any]] = {}
    for name in list(functions.keys()) if isinstance(functions, Mapping) else ():
        function = functions[name]
        while _is_split(function):
            inner = _closure(function).get("uattn")
            if not _name_of(function).startswith("deepspeed.") or inner is None:
                raise _split_by(_name_of(function))
            function = inner.attn
            whole[name] = function
    for module in ("transformers.modeling_flash_attention_utils", "transformers.integrations.flash_attention"):
        function = getattr(sys.modules.get(module), "_flash_attention_forward", None)
        if _is_split(function):
            raise _split_by(_name_of(function))
    return functions, whole


def _closure(function: Any) -> Mapping[str, Any]:
    return inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}


def _name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"


def _is_split(function: Any) -> bool:
    return any(word in _name_of(function).lower() for word in _SPLIT_WORDS)


def _is_of_accelerate(hook: Any) -> bool:
    return _name_of(hook).startswith("accelerate.big_modeling._attach_context_parallel_hooks")


def _gathered_weights(model: nn.Module) -> dict[tuple[int, str], list[tuple[Any, list[Any]]]]:
    """For weights that FSDP2 gathers before use, by module and name: its meshes, and the groups it works on."""
    found: dict[tuple[int, str], list[tuple[Any, list[Any]]]] = {}
    every: list[Any] = list(model.modules())
    for module in every:
        state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
        several = getattr(state, "_fsdp_param_groups", None)
        for group in [getattr(state, "_fsdp_param_group", None)] if several is None else several:
            for weight in () if group is None else group.fsdp_params:
                mesh_info, places = weight.mesh_info, weight._module_info
                names = ("shard_process_group", "replicate_process_group")
                groups = [getattr(mesh_info, name) for name in names if hasattr(mesh_info, name)]
                for place in (
                    (places.module, places.param_name),
                    *zip(places.shared_modules, places.shared_param_names, strict=True),
                ):
                    found.setdefault((id(place[0]), place[1]), []).append((mesh_info.mesh, groups))
    return found


def _sharded_over(parameter: Any, gathered: set[tuple[int, ...]]) -> set[tuple[str, tuple[int, ...]]]:
    """The ranks over which a DTensor is sharded while the model computes, by dimension of its mesh."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None or not hasattr(parameter, "placements") or mesh.get_coordinate() is None:
        return set()
    found = set()
    for dim in range(mesh.ndim):
        ranks = _ranks_along(mesh, dim)
        if ranks not in gathered:
            found.add((f"mesh dimension {mesh.mesh_dim_names[dim] if mesh.mesh_dim_names else dim}", ranks))
    return found


def _ranks_along(mesh: Any, dim: int) -> tuple[int, ...]:
    """The ranks of this rank's row of a mesh along a dimension."""
    place: list[Any] = list(mesh.get_coordinate())
    place[dim] = slice(None)
    return tuple(mesh.mesh[tuple(place)].tolist())


def _describe(mesh: Any) -> str:
    """The dimensions of the whole mesh that a mesh is cut from."""
    root = mesh._get_root_mesh() if hasattr(mesh, "_get_root_mesh") else mesh
    names = root.mesh_dim_names or range(root.ndim)
    return "a mesh of " + " x ".join(f"{name} {size}" for name, size in zip(names, root.mesh.shape, strict=True))


def _names(groups: set[tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(sorted({name for name, _ in groups}))


def _megatron() -> Any:
    """Megatron's groups, if it has any."""
    state: Any = sys.modules.get("megatron.core.parallel_state")
    return state if state is not None and state.model_parallel_is_initialized() else None


def _connect(groups: Sequence[Sequence[int]], count: int) -> list[int]:
    """The smallest rank that each of ``count`` ranks is connected with by groups."""
    first = list(range(count))
    for ranks in groups:
        joined = {first[rank] for rank in ranks}
        first = [min(joined) if each in joined else each for each in first]
    return first
