# SPDX-License-Identifier: Apache-2.0
"""The events of a run at which to evaluate besides the schedule. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from mir_callback.errors import ConfigError
from mir_callback.training.history import Record
from mir_callback.training.schedule import Moment, Schedule

# Besides the schedule: before the first step, after the last, at each evaluation of the Trainer, at each checkpoint.
EVENTS = ("start", "end", "evaluate", "save")
DEFAULT_EVENTS = ("start", "end")


def check_events(also_on: Any) -> tuple[str, ...]:
    """The events to evaluate at, in the order of :data:`EVENTS`.

    Raises:
        ConfigError: not a collection of names of events.
    """
    if isinstance(also_on, str) or not isinstance(also_on, Collection) or any(event not in EVENTS for event in also_on):
        raise ConfigError(
            f"also_on must be a collection of {', '.join(EVENTS)}, got {also_on!r}; the default is {DEFAULT_EVENTS}"
        )
    return tuple(event for event in EVENTS if event in also_on)


def is_due_at_start(schedule: Schedule, events: Collection[str], moment: Moment, history: Sequence[Record]) -> bool:
    """Whether to evaluate before training goes on, where an uninterrupted run would have done so. Ranks: pure.

    Args:
        schedule: of the run.
        events: evaluated besides.
        moment: step 0, or where the run is resumed.
        history: the evaluations up to there; none of ``moment`` itself.
    """
    if "start" in events and not any(record["mir"] is not None for record in history):
        return True
    at_checkpoint = moment.step > 0 and "save" in events
    return at_checkpoint or schedule.is_due(moment, moment)
