# SPDX-License-Identifier: Apache-2.0
"""What lies ahead in a run: drops of the learning rate, further epochs. MIR that is level may fall again after them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from mir_callback import distributed

_FEWEST_STEPS = 100  # of a run in which level and drop can be told apart
_POINTS = 2000  # at which a schedule is looked at, however long the run
_FLAT, _WITHIN = 0.05, 0.1  # parts of the run: level before a drop, and how long a drop may take
_LEVEL_CHANGE, _DROP = 0.01, 0.3  # relative changes of the learning rate
_MANY_EPOCHS = 10
_PART_OF_EPOCH = 0.1  # a shorter one at the end is not worth waiting for


def learning_rate_of(scheduler: Any) -> Callable[[int], float] | None:
    """The highest learning rate of all groups after each number of optimizer steps; None if the scheduler doesn't tell.

    Known are torch's schedulers with a closed form (StepLR, MultiStepLR, CosineAnnealingLR, ...) and those of
    transformers but ReduceLROnPlateau; as they are, or wrapped by Accelerate or DeepSpeed. A function of the user's is
    not called: it may have a state.

    Ranks: every rank.
    """
    stride = 1
    if type(scheduler).__name__ == "AcceleratedScheduler" and scheduler.step_with_optimizer:
        stride = 1 if scheduler.split_batches else distributed.world_size()  # it steps once for each rank
    if not hasattr(scheduler, "base_lrs"):
        scheduler = getattr(scheduler, "scheduler", scheduler)
    if isinstance(scheduler, LambdaLR):
        factors = list(zip(scheduler.lr_lambdas, scheduler.base_lrs, strict=True))
        if any(
            not getattr(getattr(each, "func", each), "__module__", "").startswith("transformers.")
            for each, _ in factors
        ):
            return None
        return lambda step: float(max(factor(stride * step) * rate for factor, rate in factors))
    if not hasattr(scheduler, "_get_closed_form_lr"):
        return None
    copied = copy.copy(scheduler)  # the run's own stays where it is

    def closed_form(step: int) -> float:
        copied.last_epoch = stride * step
        return float(max(copied._get_closed_form_lr()))

    return closed_form


def find_drops(learning_rate: Callable[[int], float], total_steps: int) -> list[int]:
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
        if was_level and begins and min(rates[index : index + after]) <= (1 - _DROP) * (1 + 1e-9) * rates[index - 1]:
            # The grid may skip steps: the first of those between its points that is lower.
            between = range(steps[index - 1] + 1, steps[index] + 1)
            drops.append(next(step for step in between if learning_rate(step) < rates[index - 1]))
    return drops


def next_drop(drops: Sequence[int], step: int) -> int | None:
    """The next drop of the learning rate after ``step`` optimizer steps; a drop at ``step`` is still to come."""
    return min((drop for drop in drops if drop >= step), default=None)


def epoch_starts(total_steps: int | None, total_epochs: float | None) -> list[int]:
    """The steps that :func:`next_epoch` gives."""
    found: list[int] = []
    while (start := next_epoch(total_steps, total_epochs, found[-1] + 1 if found else 0)) is not None:
        found.append(start)
    return found


def next_epoch(total_steps: int | None, total_epochs: float | None, step: int) -> int | None:
    """The step after which the next epoch begins; None in the last one, or if the plan is unknown.

    From ten epochs on it is None as well: a tenth of the run, as far as a stop rule looks, then holds whole epochs.

    Example:
        >>> [next_epoch(900, 3, step) for step in (0, 300, 301, 600, 601)]
        [300, 300, 600, 600, None]
    """
    if not total_steps or not total_epochs or total_epochs >= _MANY_EPOCHS:
        return None
    length = total_steps / total_epochs
    number = max(1, int(step / length))
    number += round(number * length) < step
    return round(number * length) if number <= total_epochs - _PART_OF_EPOCH else None
