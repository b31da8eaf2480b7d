# SPDX-License-Identifier: Apache-2.0
"""When an evaluation is due. Pure, so that every rank gives the same answer."""

from __future__ import annotations

from mir_callback.errors import ConfigError


def check_every(every: int) -> None:
    """Raise ConfigError unless ``every`` is a positive whole number of optimizer steps. Ranks: pure."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ConfigError(f"every must be an integer of at least 1 optimizer step, got {every!r}; use e.g. every=50")


def is_due(step: int, every: int, *, ending: bool) -> bool:
    """Whether to evaluate after optimizer step ``step``: every N steps, and when training ends. Ranks: pure."""
    return ending or step % every == 0
