# SPDX-License-Identifier: Apache-2.0
"""An evaluation whose solves go on beside training, and what training has waited for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

from mir_callback.errors import ConfigError
from mir_callback.evaluation.evaluate import MIRReport
from mir_callback.evaluation.work import Background

Solve = Literal["now", "background"]
SOLVES: tuple[str, ...] = get_args(Solve)


class Pending:
    """An evaluation of the weights of an earlier step.

    Args:
        step: that step.
        epoch: its epoch.
        begin: starts the evaluation, see :func:`mir_callback.evaluation.evaluate.evaluate_beside`.

    Attributes:
        step: as given.
        epoch: as given.

    Ranks: collective, construction and :meth:`advance`.
    """

    def __init__(self, step: int, epoch: float | None, begin: Callable[[], Background[MIRReport]]) -> None:
        self.step = step
        self.epoch = epoch
        self._waited = 0.0
        with self._waiting():
            self._work = begin()

    def advance(self, *, wait: bool) -> bool:
        """Whether it is finished; ``wait`` until it is. Raises what failed."""
        with self._waiting():
            return self._work.advance(wait=wait)

    def fields(self) -> dict[str, Any]:
        """Of its record, once finished: `seconds` is what training waited, `wall_seconds` all its time."""
        fields = self._work.value.as_dict()
        return fields | {"seconds": self._waited, "wall_seconds": fields["seconds"]}

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - started


def check_solve(solve: str, *, keep_best: bool) -> None:
    """Raise ConfigError unless evaluations can be solved so. Ranks: pure."""
    if solve not in SOLVES:
        raise ConfigError(f"solve must be one of {', '.join(SOLVES)}, got {solve!r}; use 'now' to wait for each value")
    if solve == "background" and keep_best:
        raise ConfigError(
            "solve='background' must come without keep_best, got both: when the value is known the weights it belongs "
            "to are gone; use solve='now' with keep_best"
        )
