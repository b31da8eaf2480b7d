# SPDX-License-Identifier: Apache-2.0
"""Put sharded weights back into their shards after forwards without a backward pass: ZeRO-3, FSDP2, FSDP1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# What DeepSpeed's coordinator of ZeRO-3 weights notes of a forward and its backward pass.
_TRACE = [
    f"_PartitionedParameterCoordinator__{name}"
    for name in ("trace_mode", "submodule_order", "param_order", "step_id", "step_id_module_fetched_for")
]


def release_leftovers(model: nn.Module, *zero_owners: Any) -> None:
    """Before a forward, release weights that another forward-only pass, such as Trainer.evaluate, left gathered.

    After a training step only small ZeRO-3 weights are gathered, which DeepSpeed does on purpose; then nothing is done.
    Ranks: every rank.
    """
    _reshard(model)
    for parameter in model.parameters():
        gathered = getattr(parameter, "ds_status", None) is not None and not is_partitioned(parameter)
        if gathered and not getattr(parameter, "ds_persist", False):
            release_gathered_weights(*zero_owners)
            return


def release_gathered_weights(*zero_owners: Any) -> None:
    """Partition ZeRO-3 weights again that a forward-only pass left gathered.

    Without a backward pass up to `stage3_max_live_parameters` stay gathered, and some are being prefetched. Does
    nothing without DeepSpeed and for stages 0 to 2. Ranks: every rank that took part in the forward.
    """
    owner = _find(zero_owners, "empty_partition_cache")
    if owner is not None:
        owner.empty_partition_cache()


@contextmanager
def preserve_zero3(*zero_owners: Any) -> Iterator[None]:
    """On exit ZeRO-3 weights are partitioned, and the order in which training uses them is the one that was recorded.

    DeepSpeed prefetches in that order. Forwards that use weights in another one, as a loss of the trainer's own does,
    would replace it, and the next training forward would find weights gathered that it gathers itself.

    Args:
        *zero_owners: as of `preserve_training_state`.

    Ranks: every rank that took part in the forwards.
    """
    owner = _find(zero_owners, "parameter_offload")
    coordinator = getattr(getattr(owner, "parameter_offload", None), "param_coordinator", None)
    kept = {} if coordinator is None else vars(coordinator)
    recorded = {name: _copied(kept[name]) for name in _TRACE if name in kept}
    try:
        yield
    finally:
        release_gathered_weights(*zero_owners)
        kept.update(recorded)


def _find(zero_owners: tuple[Any, ...], name: str) -> Any:
    """The first with this attribute: an engine, its optimizer, or what a wrapper is around; None if none has it."""
    inner = (candidate for owner in zero_owners for candidate in (owner, getattr(owner, "optimizer", None)))
    return next((each for each in inner if getattr(each, name, None) is not None), None)


def _copied(value: Any) -> Any:
    """A copy of what DeepSpeed notes of a trace: numbers, sequences, and a mapping of queues."""
    if isinstance(value, dict):
        copied = value.copy()
        copied.update({key: queue.copy() for key, queue in value.items()})
        return copied
    return value.copy() if isinstance(value, list) else value


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has partitioned this weight, which is then an empty tensor."""
    return getattr(getattr(parameter, "ds_status", None), "name", None) == "NOT_AVAILABLE"


def is_shard(parameter: nn.Parameter) -> bool:
    """Whether a rank holds only a part of this weight: under ZeRO-3, or as a DTensor of FSDP2 or tensor parallelism."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh")


def is_sharded(model: nn.Module) -> bool:
    """Whether a rank holds only parts of some weights: as of `is_shard`, or under FSDP1. Ranks: pure."""
    return any(map(is_shard, model.parameters())) or bool(_fsdp1_wrappers(model))


@contextmanager
def preserve_fsdp(model: nn.Module) -> Iterator[None]:
    """On exit FSDP2 and FSDP1 are as they were before the forwards inside, also if one of them failed.

    FSDP leaves its root unsharded after a forward, as a backward pass is about to follow, notes the order of the
    modules in which that would gather weights, and takes the first module that is called for the root of all others.
    A forward that fails leaves it in the middle of one, with gathers in flight.

    Ranks: every rank; no communication, but it waits for gathers in flight.
    """
    _reshard(model)
    restore = [_remember_state(state) for state in fsdp_states(model)]
    restore += [_remember_wrapper(wrapper) for wrapper in _fsdp1_wrappers(model)]
    try:
        yield
    finally:
        for each in restore:
            each()
        _reshard(model)


@contextmanager
def record_gathers(model: nn.Module) -> Iterator[list[list[int]]]:
    """Inside, each forward of the model adds a list: the modules for whose calls weights are gathered, in order.

    Modules are numbers here. ZeRO-3 gathers for every module with weights of its own, or for all of a leaf module at
    once, FSDP for those it wraps. Ranks whose lists differ would wait for one another. Ranks: pure.
    """
    found: list[list[int]] = []

    def note(number: int) -> Callable[..., None]:
        return lambda *_: found[-1].append(number)

    handles = [model.register_forward_pre_hook(lambda *_: found.append([]))]
    within: set[nn.Module] = set()  # of a leaf module
    for number, module in enumerate(model.modules()):
        is_leaf = getattr(module, "_z3_leaf", False)
        is_owner = is_leaf or any(hasattr(weight, "ds_id") for weight in module._parameters.values())
        if module not in within and (is_owner or is_fsdp1(module) or hasattr(module, "_get_fsdp_state")):
            handles.append(module.register_forward_pre_hook(note(number)))
        if is_leaf:
            within |= set(module.modules())
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def fsdp_states(model: nn.Module) -> list[Any]:
    """FSDP2's state of each module given to `fully_shard`, outer ones first. Ranks: pure."""
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "_get_fsdp_state")]
    states = [module._get_fsdp_state() for module in modules]
    return list({id(state): state for state in states}.values())  # several modules may share one


def is_fsdp1(module: nn.Module) -> bool:
    """Whether a module is FSDP1's wrapper. Ranks: pure."""
    return any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__)


def _fsdp1_wrappers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if is_fsdp1(module)]


def _reshard(model: nn.Module) -> None:
    for state in fsdp_states(model):
        for group in _groups_of(state):
            group.reshard()
    for wrapper in _fsdp1_wrappers(model):
        handle = wrapper._handle
        if handle is not None and handle.uses_sharded_strategy and hasattr(handle.flat_param, "_full_param_padded"):
            handle.reshard(True)
            handle.post_reshard()
            handle._prefetched = False


def _groups_of(state: Any) -> list[Any]:
    """The parameter groups of an FSDP2 state: several since torch 2.12, before that one or none."""
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _remember_state(state: Any) -> Callable[[], None]:
    """A function that takes an FSDP2 state back to what it is now, in what forwards change but its weights."""
    shared, is_new = state._state_ctx, state._is_root is None
    forward_root, order = shared.iter_forward_root, list(getattr(state._comm_ctx, "post_forward_order", ()))
    found = [(part, dict(vars(part))) for part in (state, *_groups_of(state))]
    indices = [list(group._post_forward_indices) for group in _groups_of(state)]

    def restore() -> None:
        communication = state._comm_ctx
        if state._is_root is None:
            return  # it was not reached
        _wait_for(state, communication.all_gather_state)
        communication.all_gather_state = None
        for group, known in zip(_groups_of(state), indices, strict=True):
            _wait_for(state, group._all_gather_result)
            group._all_gather_result = None
            group._post_forward_indices[:] = known
            group._training_state = type(group._training_state).IDLE
        communication.post_forward_order[:] = order
        getattr(state, "_modules_to_run_forward", set()).clear()
        state._training_state = type(state._training_state).IDLE
        state._state_ctx.iter_forward_root = forward_root
        if is_new:
            # Training may call a module further out first, which FSDP refuses once an inner one is a root.
            for group in _groups_of(state):
                group.reshard()
            for part, known_values in found:
                vars(part).update(known_values)
            shared.all_states.clear()

    return restore


def _wait_for(state: Any, gather: Any) -> None:
    """Wait for a gather in flight, whose result nobody will use."""
    gather = getattr(gather, "all_gather_result", gather)
    if gather is None:
        return
    if gather.all_gather_event is not None:
        state._device_handle.current_stream().wait_event(gather.all_gather_event)
    if hasattr(gather.all_gather_work, "wait"):
        gather.all_gather_work.wait()


def _remember_wrapper(wrapper: Any) -> Callable[[], None]:
    """The same for FSDP1. Its lazy initialization is undone with the wrapper's attributes, by its caller."""
    order, handle = wrapper._exec_order_data, wrapper._handle
    known = list(order.handles_post_forward_order)
    index = None if handle is None else handle._post_forward_index

    def restore() -> None:
        order.handles_post_forward_order[:] = known
        wrapper.training_state = type(wrapper.training_state).IDLE
        if handle is not None:
            handle._training_state = type(handle._training_state).IDLE
            handle._post_forward_index = index

    return restore
