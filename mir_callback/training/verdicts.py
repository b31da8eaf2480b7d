# SPDX-License-Identifier: Apache-2.0
"""What a stop rule makes of a history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

VerdictKind = Literal["going on", "plateau", "rising", "too noisy", "no data"]


@dataclass(frozen=True)
class Verdict:
    """What a rule made of a history.

    Attributes:
        kind: "going on", "plateau", "rising", "too noisy" or "no data".
        reason: the figures behind it, as a sentence.
        expected_gain: by how much MIR would still fall over the rule's horizon, below zero where it rises; None where
            the rule has no estimate.
        expected_gain_se: its standard error.
        observed: the rule only watches: a plateau is told, and training goes on.
    """

    kind: VerdictKind
    reason: str
    expected_gain: float | None = None
    expected_gain_se: float | None = None
    observed: bool = False

    @property
    def stop(self) -> bool:
        """Whether training should stop."""
        return self.kind == "plateau" and not self.observed

    @property
    def would_stop(self) -> bool:
        """Whether training should stop, or would if the rule did not only watch."""
        return self.kind == "plateau"
