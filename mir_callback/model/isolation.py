# SPDX-License-Identifier: Apache-2.0
"""An evaluation leaves no trace: modes, buffers, random streams, gathered and schedule-free weights are put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_KINDS = (Tensor, int, float, type(None))


@contextmanager
def preserve_training_state(model: nn.Module, *zero_owners: Any) -> Iterator[None]:
    """Evaluation mode without gradients inside; afterwards the model and every random stream are as they were.

    Restored, also after an exception: the train/eval flag of every single module (a frozen tower kept in evaluation
    mode stays so); tensors and numbers that modules keep from their last forward (Qwen-VL's `rope_deltas`), and buffers
    that it replaces (RoPE that follows the length); the random states of Python, NumPy, torch and the accelerator; the
    dtype that a weight shows while it is in its shards. ZeRO-3's gathered or in-flight weights are released.

    `no_grad` is used and not `inference_mode`: weights gathered by ZeRO-3 under the latter could not be used in the
    next backward pass.

    Args:
        model: any module; its own flags and those of all modules below it are handled.
        *zero_owners: objects that may own ZeRO-3 partitioned weights: the DeepSpeed engine, its optimizer, or a
            wrapper around one of them. Others, and None, are ignored.

    Ranks: each for itself, but every rank must enter it (releasing weights waits for gathers in flight).
    """
    flags = [(module, module.training) for module in model.modules()]
    kept = [(module, *_kept_values(module)) for module in model.modules()]
    shown = [(parameter, parameter.dtype) for parameter in model.parameters() if _in_shards(parameter)]
    states = _random_states()
    try:
        # Not model.eval(): modules may override it to do more, such as merging adapters into their weights.
        for module, _ in flags:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training
        for module, attributes, buffers in kept:
            _restore_values(module, attributes, buffers)
        release_gathered_weights(*zero_owners)
        # A cast of the model casts only the empty tensor, and the first gathering shows the shards' own dtype again.
        # LLaVA casts its vision tower, and then its images to the dtype that the tower shows.
        for parameter, dtype in shown:
            if _in_shards(parameter) and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        for state, restore in states:
            restore(state)


def release_leftovers(model: nn.Module, *zero_owners: Any) -> None:
    """Before a forward, release weights that somebody else's forward-only pass, as the Trainer's own, left gathered.

    After a training step only small weights are, which DeepSpeed keeps gathered on purpose; then nothing is done.
    Ranks: every rank.
    """
    for parameter in model.parameters():
        gathered = getattr(parameter, "ds_status", None) is not None and not _in_shards(parameter)
        if gathered and not getattr(parameter, "ds_persist", False):
            release_gathered_weights(*zero_owners)
            return


def release_gathered_weights(*zero_owners: Any) -> None:
    """Give ZeRO-3 weights that a forward-only pass left gathered back to their shards.

    A pass without a backward leaves up to `stage3_max_live_parameters` gathered, and some in flight for a backward
    that never comes. A no-op without DeepSpeed and for stages 0 to 2. Ranks: every rank that took part in the forward.
    """
    for owner in zero_owners:
        for candidate in (owner, getattr(owner, "optimizer", None)):  # an engine, its optimizer, a wrapper around it
            release = getattr(candidate, "empty_partition_cache", None)
            if release is not None:
                release()
                return


def _in_shards(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 has left an empty tensor in the place of this weight."""
    return getattr(getattr(parameter, "ds_status", None), "name", None) == "NOT_AVAILABLE"


def _kept_values(module: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor | None]]:
    """What a forward may leave behind in a module: plain attributes that are tensors, numbers or None; its buffers."""
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
    """Every random stream's state and what puts it back."""
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
    """While open, the model holds the weights its optimizer means to be evaluated, as in `Trainer.evaluate`.

    Such an optimizer moves the weights there and back in place (`eval()`, `train()`), which rounds; so the weights
    themselves are kept meanwhile, in host memory, and put back to the last bit.

    None, an ordinary optimizer, and one that works on weights of its own, as DeepSpeed's do, are left alone: the model
    then shows the weights that are trained. Ranks: each for itself.
    """
    inner = _switchable(optimizer)
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


def _switchable(optimizer: Any) -> Any:
    """The innermost optimizer, if it has two modes; wrappers of accelerate and DeepSpeed hold theirs as `optimizer`."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    both = callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))
    return optimizer if both and hasattr(optimizer, "param_groups") else None
