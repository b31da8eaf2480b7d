# SPDX-License-Identifier: Apache-2.0
"""Where a stop rule would have ended a run, and what that would have saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mir_callback.training.verdicts import Verdict


class StopRule(Protocol):
    """What `PlateauRule` is, or a rule of one's own."""

    def verdict(self, history: Sequence[Mapping[str, Any]]) -> Verdict:
        """Judge a history."""
        ...


@dataclass(frozen=True)
class Stop:
    """Where a rule would have ended a run, judging after each evaluation as it does in training.

    Attributes:
        step: of the evaluation after which it would have stopped, or None if it would not have.
        reason: the rule's, there or at the run's end.
        end: the run's last step that was evaluated.
        saved_steps: steps not taken; 0 without a stop.
        saved_share: of the steps the run took.
        saved_seconds: training time not spent, or None where the run does not know it.
        mir: at the stop, or None.
        given_away: how much lower MIR was at the run's end than at the stop; negative if it was higher. None without a
            stop.
    """

    step: int | None
    reason: str
    end: int
    saved_steps: int
    saved_share: float
    saved_seconds: float | None
    mir: float | None
    given_away: float | None


def stop_of(records: Sequence[Mapping[str, Any]], rule: StopRule) -> Stop:
    """Judge a run's evaluations one after the other.

    Args:
        records: of a run, at least one, failed ones included.
        rule: the stop rule.

    Ranks: pure.
    """
    last = records[-1]
    verdict = Verdict("no data", "")
    for count in range(1, len(records) + 1):
        verdict = rule.verdict(records[:count])
        if verdict.stop:
            return _stop_at(records[count - 1], records, verdict.reason)
    return Stop(None, f"{verdict.kind}: {verdict.reason}", last["step"], 0, 0.0, 0.0, None, None)


def _stop_at(record: Mapping[str, Any], records: Sequence[Mapping[str, Any]], reason: str) -> Stop:
    last = records[-1]
    saved = last["step"] - record["step"]
    final = next(later["mir"] for later in reversed(records) if later["mir"] is not None)
    return Stop(
        record["step"],
        reason,
        last["step"],
        saved,
        saved / last["step"] if last["step"] else 0.0,
        _seconds_between(record, last),
        record["mir"],
        None if record["mir"] is None else record["mir"] - final,
    )


def _seconds_between(record: Mapping[str, Any], last: Mapping[str, Any]) -> float | None:
    """Training time between two evaluations; `elapsed` starts anew with every process, and may have gone back."""
    for clock in ("train_seconds", "elapsed"):
        start, end = record.get(clock), last.get(clock)
        if start is not None and end is not None and end >= start:
            return float(end - start)
    return None
