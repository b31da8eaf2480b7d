# SPDX-License-Identifier: Apache-2.0
"""What becomes of a failed evaluation: does it end the run, and when is it enough. The same on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mir_callback.errors import ConfigError

OnError = Literal["warn", "raise"]
ON_ERROR: tuple[str, ...] = get_args(OnError)


@dataclass(frozen=True)
class FailurePolicy:
    """When a failed evaluation ends the run, and when evaluations end.

    Attributes:
        on_error: "warn": the first evaluation of a run raises, as a wrong set-up must show at once, later ones leave
            a warning and a record without a value; "raise": every failure ends the run.
        max_failures: failures in a row after which there are no more evaluations; None for no limit.

    Raises:
        ConfigError: a value breaks its rule.
    """

    on_error: str = "warn"
    max_failures: int | None = 3

    def __post_init__(self) -> None:
        """Check the values."""
        if self.on_error not in ON_ERROR:
            raise ConfigError(f"on_error must be one of {', '.join(ON_ERROR)}, got {self.on_error!r}")
        limit = self.max_failures
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise ConfigError(f"max_failures must be an integer of at least 1, or None for no limit, got {limit!r}")

    def tolerates(self, *, first: bool) -> bool:
        """Whether a failing evaluation may be passed over; ``first``: the run has no record before it."""
        return self.on_error == "warn" and not first


class Failures:
    """Failed evaluations in a row in this process's run.

    Attributes:
        policy: what they lead to.
        disabled: whether there were too many.
    """

    def __init__(self, policy: FailurePolicy) -> None:
        self.policy = policy
        self.reset()

    def reset(self) -> None:
        """A run begins, or begins again: what was wrong may have been put right."""
        self._in_a_row = 0
        self.disabled = False

    def count(self, failed: bool, error: str | None) -> dict[str, str]:
        """Note one evaluation; fields of its record that say why it was the last one, if it was."""
        self._in_a_row = self._in_a_row + 1 if failed else 0
        limit = self.policy.max_failures
        self.disabled = limit is not None and self._in_a_row >= limit
        if not self.disabled:
            return {}
        return {
            "disabled": f"{self._in_a_row} evaluations in a row have failed (max_failures={limit}), the last with "
            f"{error}; no more are tried in this run, training goes on. A restart tries again"
        }
