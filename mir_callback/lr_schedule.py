# SPDX-License-Identifier: Apache-2.0
"""At which steps will the learning rate drop? MIR that is level before a drop may fall again after it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

_FEWEST_STEPS = 100  # of a run in which level and drop can be told apart
_POINTS = 2000  # at which a schedule is looked at, however long the run
_FLAT, _WITHIN = 0.05, 0.1  # parts of the run: level before a drop, and how long a drop may take
_LEVEL_CHANGE, _DROP = 0.01, 0.3  # relative changes of the learning rate


def learning_rate_of(scheduler: Any) -> Callable[[int], float] | None:
    """The learning rate after each number of steps, relative or absolute; None if the scheduler doesn't tell.

    Known are torch's schedulers with a closed form (StepLR, MultiStepLR, CosineAnnealingLR, ...) and LambdaLR, of which
    all of transformers' but ReduceLROnPlateau are made; as they are, or wrapped by Accelerate or DeepSpeed.
    """
    while hasattr(scheduler, "scheduler"):
        scheduler = scheduler.scheduler
    lambdas = getattr(scheduler, "lr_lambdas", None)
    if lambdas:
        return lambda step: float(lambdas[0](step))
    if not hasattr(scheduler, "_get_closed_form_lr"):
        return None
    looked_at = copy.copy(scheduler)  # the run's own stays where it is

    def closed_form(step: int) -> float:
        looked_at.last_epoch = step
        return float(looked_at._get_closed_form_lr()[0])

    return closed_form


def find_drops(learning_rate: Callable[[int], float], total_steps: int, start_step: int = 0) -> list[int]:
    """The steps at which a learning rate that was level begins to fall by 30 % or more within a tenth of the run.

    A decay that is smooth over the run (linear, cosine) has none.

    Example:
        >>> find_drops(lambda step: 1.0 if step < 600 else 0.1, total_steps=1000)
        [600]
        >>> find_drops(lambda step: 1 - step / 1000, total_steps=1000)
        []
    """
    if total_steps < _FEWEST_STEPS:
        return []
    stride = max(1, total_steps // _POINTS)
    steps = list(range(0, total_steps, stride))
    rates = [learning_rate(step) for step in steps]
    before, after = max(1, round(_FLAT * len(steps))), max(1, round(_WITHIN * len(steps)))
    drops: list[int] = []
    for index in range(before, len(steps)):
        level = rates[index - before : index]
        if drops and steps[index] - drops[-1] < before * stride:
            continue  # the same drop
        was_level = min(level) > 0 and max(level) - min(level) <= _LEVEL_CHANGE * max(level)
        begins = rates[index] < (1 - _LEVEL_CHANGE / before) * rates[index - 1]
        if was_level and begins and min(rates[index : index + after]) <= (1 - _DROP) * rates[index - 1]:
            # The grid may skip steps: the first of those between its points that is lower.
            between = range(steps[index - 1] + 1, steps[index] + 1)
            drops.append(next(step for step in between if learning_rate(step) < rates[index - 1]))
    return [step for step in drops if step > start_step]
