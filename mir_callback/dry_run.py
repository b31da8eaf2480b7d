# SPDX-License-Identifier: Apache-2.0
"""What a dry run says: what one evaluation cost, and what the schedule will."""

from __future__ import annotations

from collections.abc import Collection

from mir_callback.evaluation.evaluate import MIRReport
from mir_callback.schedule import Schedule, TimeShare, due_steps


class DryRunDone(SystemExit):
    """Ends the script after a dry run, with exit code 0, before it can train or save anything."""

    def __init__(self) -> None:
        super().__init__(0)


def summarize(
    report: MIRReport, schedule: Schedule, events: Collection[str], total_steps: int | None, total_epochs: float | None
) -> list[str]:
    """The lines of a dry run.

    Args:
        report: of the evaluation that was made.
        schedule: of the run to come.
        events: evaluated besides.
        total_steps: optimizer steps of the run to come, if known.
        total_epochs: epochs of it, if known.

    Ranks: pure.
    """
    ranks = f"{report.world_size} rank{'s' * (report.world_size > 1)}"
    memory = f"peak memory {report.peak_memory_bytes / 1e9:.2f} GB beyond what was held"
    return [
        f"dry run: MIR {report.mir:.4f} of the weights as they are, {report.num_samples} samples, "
        f"{report.num_vision_tokens} vision and {report.num_text_tokens} text tokens, {report.dtype}",
        f"one evaluation: {report.seconds:.1f} s on {ranks}, {memory}",
        f"the run: {_plan(report.seconds, schedule, events, total_steps, total_epochs)}",
        "no step was trained and no history was written; leave dry_run (--mir_dry_run) out to train",
    ]


def _plan(
    seconds: float, schedule: Schedule, events: Collection[str], total_steps: int | None, total_epochs: float | None
) -> str:
    more = [f"one at each {event}" for event in ("evaluate", "save") if event in events]
    if isinstance(schedule, TimeShare):
        pause = seconds * (1 - schedule.share) / schedule.share
        parts = [f"one evaluation after every {pause:.0f} s of training at most ({schedule.share:.3g} of the time)"]
    elif total_steps:
        steps = set(due_steps(schedule, total_steps, total_epochs or 1.0))
        steps |= {0} if "start" in events else set()
        steps |= {total_steps} if "end" in events else set()
        cost = f"about {len(steps) * seconds:.0f} s in all"
        parts = [f"{len(steps)} evaluations in {total_steps} steps with {schedule}, {cost}"]
    else:
        parts = [f"{schedule}, number of steps unknown"]
    return ", and ".join([*parts, *more])
