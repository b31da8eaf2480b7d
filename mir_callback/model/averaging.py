# SPDX-License-Identifier: Apache-2.0
"""Optimizers that train other weights than they evaluate (schedule-free ones): look at the latter, leave the former."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluation_weights(model: nn.Module, optimizer: Any) -> Iterator[None]:
    """While open, the model holds the weights its optimizer means to be evaluated, as in `Trainer.evaluate`.

    Such an optimizer moves the weights there and back in place (`eval()`, `train()`), which rounds; so the weights
    themselves are kept meanwhile, in host memory, and put back to the last bit.

    An optimizer that works on weights of its own, as DeepSpeed's do, is left alone: the model then shows the weights
    that are trained.

    Args:
        model: the module.
        optimizer: the run's optimizer, wrapped or not; None and ordinary ones are ignored.

    Ranks: each for itself.
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
