# SPDX-License-Identifier: Apache-2.0
"""Restore the training state after an evaluation: modes, buffers, random states, sharded and schedule-free weights."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mir_callback.model.decoder import not_compiled
from mir_callback.model.sharding import is_partitioned, preserve_fsdp, preserve_zero3

# Of bitsandbytes' 4-bit layers (0.50.2): in evaluation mode they repack their weights for inference on such a CPU, and
# no gradient flows through them from then on.
_REPACKS = "support_avx512bf16_for_cpu"
_KINDS = (Tensor, int, float, type(None))


@contextmanager
def preserve_training_state(model: nn.Module, *zero_owners: Any) -> Iterator[None]:
    """Evaluation mode, no_grad, uncompiled inside; on exit model and random states are restored, also after an error.

    Restored are: the train/eval flag of every single module (a frozen tower that is kept in evaluation mode stays so);
    tensors and numbers that modules keep from their last forward (Qwen-VL's `rope_deltas`), and buffers that a forward
    replaces (RoPE that depends on the length); the random states of Python, NumPy, torch and the accelerator; the
    dtype of partitioned ZeRO-3 weights. Weights that ZeRO-3 or FSDP has gathered, or is gathering, are released.

    `no_grad` and not `inference_mode`, because weights that ZeRO-3 gathers under the latter cannot be used in the next
    backward pass.

    Args:
        model: any module.
        *zero_owners: objects that may own ZeRO-3 partitioned weights: the DeepSpeed engine, its optimizer, or a
            wrapper around one of them. Others, and None, are ignored.

    Ranks: every rank must enter it, because releasing weights waits for gathers in flight.
    """
    flags = [(module, module.training) for module in model.modules()]
    # Not of DDP itself, which initializes itself in its first forward and can't do so twice.
    kept = [(each, *_kept_values(each)) for each in model.modules() if type(each).__name__ != "DistributedDataParallel"]
    shown = [(parameter, parameter.dtype) for parameter in model.parameters() if is_partitioned(parameter)]
    states = _random_states()
    try:
        # Not model.eval(): modules may override it to do more, such as merging adapters into their weights.
        for module, _ in flags:
            module.training = False
            if getattr(module, _REPACKS, False):
                setattr(module, _REPACKS, False)  # restored with the other attributes
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            _eager(model),
            preserve_fsdp(model),
            preserve_zero3(*zero_owners),
        ):
            yield
    finally:
        for module, training in flags:
            module.training = training
        for module, attributes, buffers in kept:
            _restore_values(module, attributes, buffers)
        # Casting a model casts only the empty tensors of partitioned weights, and gathering them brings the dtype of
        # the partitions back. LLaVA casts its vision tower, and later casts images to the dtype of the tower.
        for parameter, dtype in shown:
            if is_partitioned(parameter) and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        for state, restore in states:
            restore(state)


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Inside, what `torch.compile` has compiled runs as written: nothing is compiled, and what is compiled stays.

    Dynamo can't trace our hooks, and graphs for evaluation would use up its limit of recompilations.
    """
    if hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
        return
    # Before torch 2.6. Functions that are compiled on their own stay so there.
    replaced = []
    for module in model.modules():
        own, inner = vars(module), not_compiled(module)
        if own.get("_compiled_call_impl") is not None:  # module.compile()
            replaced.append((own, "_compiled_call_impl", own["_compiled_call_impl"]))
            own["_compiled_call_impl"] = None
        if inner is not module and "forward" in own:  # torch.compile(module)
            replaced.append((own, "forward", own["forward"]))
            own["forward"] = inner.__call__
    try:
        yield
    finally:
        for own, name, value in replaced:
            own[name] = value


def _kept_values(module: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
    """What a forward may change in a module: attributes that are tensors, numbers or None; its buffers."""
    return {name: value for name, value in vars(module).items() if isinstance(value, _KINDS)}, dict(module._buffers)


def _restore_values(module: nn.Module, attributes: dict[str, Any], buffers: dict[str, Tensor | None]) -> None:
    for name, value in attributes.items():
        if vars(module).get(name, module) is not value:
            setattr(module, name, value)
    for name, value in list(vars(module).items()):
        if name not in attributes and (value is None or isinstance(value, Tensor)):
            delattr(module, name)
    module._buffers.update(buffers)


def _random_states() -> list[tuple[Any, Callable[[Any], None]]]:
    """The state of every random generator, and the function that restores it."""
    states: list[tuple[Any, Callable[[Any], None]]] = [
        (random.getstate(), random.setstate),
        (np.random.get_state(), np.random.set_state),
        (torch.get_rng_state(), torch.set_rng_state),
    ]
    for name in ("cuda", "xpu", "npu"):
        module = getattr(torch, name, None)
        if module is not None and module.is_available() and module.is_initialized():
            return [*states, (module.get_rng_state(), module.set_rng_state)]
    return states


@contextmanager
def evaluation_weights(model: nn.Module, optimizer: Any) -> Iterator[None]:
    """Inside, the model has the weights that a schedule-free optimizer evaluates, as in `Trainer.evaluate`.

    Such an optimizer changes the weights in place (`eval()`, `train()`), with rounding. So a copy of the training
    weights is kept in host memory and restored, to the last bit.

    Without such an optimizer, or with one that works on weights of its own as DeepSpeed's do, nothing is done.
    Ranks: any; no communication.
    """
    inner = _schedule_free(optimizer)
    parameters = [] if inner is None else [p for group in inner.param_groups for p in group["params"]]
    own = {id(parameter) for parameter in model.parameters()}
    if inner is None or not all(id(parameter) in own for parameter in parameters):
        yield
        return
    modes = [group.get("train_mode") for group in inner.param_groups]
    if not any(mode is None or mode for mode in modes):
        yield  # evaluation mode already
        return
    kept = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    try:
        inner.eval()
        yield
    finally:
        inner.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def _schedule_free(optimizer: Any) -> Any:
    """The innermost optimizer, if it is schedule-free; accelerate's and DeepSpeed's wrappers have it as `optimizer`."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    both = callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))
    return optimizer if both and hasattr(optimizer, "param_groups") else None
