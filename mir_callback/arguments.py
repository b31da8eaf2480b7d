# SPDX-License-Identifier: Apache-2.0
"""What a training loop hands to a monitor, checked."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mir_callback.errors import ConfigError
from mir_callback.record import is_seed

_log = logging.getLogger(__name__)

# How far training has come: keyword arguments of MIRMonitor.step.
STATUS = ("epoch", "loss", "loss_step", "samples_seen", "tokens_seen")


def check_status(status: Mapping[str, Any]) -> None:
    """ConfigError for a name that is none of STATUS."""
    unknown = sorted(set(status) - set(STATUS))
    if unknown:
        raise ConfigError(f"start_status has no {unknown[0]!r}; it takes {', '.join(STATUS)}")


def check_whole(name: str, value: Any) -> int:
    """A whole number of Python, NumPy or torch."""
    try:
        if not isinstance(value, bool) and (whole := operator.index(value)) >= 0:
            return whole
    except TypeError:
        pass
    raise ConfigError(f"{name}={value!r}: give a whole number of optimizer steps, 0 or more")


def check_seed(name: str, value: Any) -> int | None:
    """A seed of Python, NumPy or torch, or None."""
    if value is None:
        return None
    try:
        if not isinstance(value, bool) and is_seed(whole := operator.index(value)):
            return whole
    except TypeError:
        pass
    raise ConfigError(f"{name}={value!r:.60}: give the integer that the run was seeded with, or leave it out")


def finite_or_none(loss: Any) -> float | None:
    """A loss, from a number or a one-element tensor; None if it is neither or not finite, which ends no run."""
    try:
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        if loss is not None:
            _log.warning("the record has no loss: loss=%.60r is not one number: %s", loss, error)
        return None
    return value if math.isfinite(value) else None
