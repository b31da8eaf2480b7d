# SPDX-License-Identifier: Apache-2.0
"""When someone should be told: on a plateau, and when MIR begins to rise. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mir_callback.training.history import STOPPING, Record


@dataclass(frozen=True)
class Alert:
    """A message to whoever watches a run.

    Attributes:
        title: a few words.
        text: step and reason.
        urgent: a warning, not just news.
    """

    title: str
    text: str
    urgent: bool


def due_alert(earlier: Sequence[Record], record: Record) -> Alert | None:
    """What to tell of an evaluation.

    A plateau is told once in a training stage, a rise once until MIR has recovered from it: until an evaluation finds
    that it goes on falling, or level. What was told is known from the records, so a resumed run does not repeat it.

    Args:
        earlier: the run's records before it.
        record: the evaluation.

    Ranks: pure.
    """
    same = [old for old in earlier if old.get("stage") == record.get("stage")]
    text = f"step {record['step']}, MIR {_value(record)}: {record.get('reason')}"
    if record.get("verdict") == STOPPING:
        return Alert("MIR has reached its plateau: training stops", text, urgent=False)
    if record.get("would_stop") and not any(old.get("would_stop") for old in same):
        return Alert("MIR has reached its plateau", text, urgent=False)
    if record.get("verdict") == "rising":
        clear = [old["verdict"] for old in same if old.get("verdict") in ("rising", "going on", STOPPING)]
        if clear[-1:] != ["rising"]:
            return Alert("MIR is rising", text, urgent=True)
    return None


def _value(record: Record) -> str:
    return "unknown" if record["mir"] is None else f"{record['mir']:.4f}"
