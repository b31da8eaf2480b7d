# SPDX-License-Identifier: Apache-2.0
"""What is said on the console: the logger `mir_callback`, whose lines stand above progress bars.

Everything goes through `logging.getLogger("mir_callback")`: silence it with `setLevel(logging.ERROR)`, or take its
handler away and put your own in its place. What all ranks have to say is said by rank 0.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from tqdm.auto import tqdm

from mir_callback import distributed
from mir_callback.early_stopping import Verdict
from mir_callback.record import EvalRecord
from mir_callback.schedule import Schedule, TimeShare, due_steps

log = logging.getLogger("mir_callback")

UNATTACHED = (
    "this callback is not attached to the Trainer: values go to the history file and, if a run is active, directly to "
    "wandb. MIRCallback(...).attach(trainer) would send them through Trainer.log as well, to every reporter and to "
    "trainer.state.log_history."
)


class ConsoleHandler(logging.Handler):
    """Rank 0's lines, `[mir] ...`, on standard output; warnings, of other ranks too, on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line above the progress bars."""
        serious, rank = record.levelno >= logging.WARNING, distributed.rank()
        if rank > 0 and not serious:
            return
        line = f"[mir] {f'rank {rank}: ' if rank > 0 else ''}{'WARNING: ' if serious else ''}{record.getMessage()}"
        with suppress(OSError, ValueError):  # a full disk behind stdout, a closed pipe: there is nowhere to say it
            tqdm.write(line, file=sys.stderr if serious else sys.stdout)


def _set_up() -> None:
    """Let the logger speak, unless the user has given it a handler or a level already."""
    if not log.handlers:
        log.addHandler(ConsoleHandler())
        log.propagate = False  # a script that configures the root logger would show each line twice
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)


def evaluation_line(record: EvalRecord, verdict: Verdict | None) -> str:
    """One evaluation in one line."""
    if record.mir is None:
        return f"step {record.step}: evaluation FAILED after {record.seconds:.1f} s: {record.error}"
    spread = "" if record.mir_se is None else f" +- {record.mir_se:.4f}"
    line = f"step {record.step}: MIR {record.mir:.4f}{spread} ({record.seconds:.1f} s)"
    if verdict is None:
        return line
    if verdict.would_stop:
        what = "stopping training" if verdict.stop else "only observing, training goes on"
        return f"{line} {verdict.kind}; {what}: {verdict.reason}"
    return f"{line} {verdict.kind}: {verdict.reason}"


def dry_run_lines(
    report: Any, schedule: Schedule, events: Collection[str], total_steps: int | None, total_epochs: float | None
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


_set_up()
