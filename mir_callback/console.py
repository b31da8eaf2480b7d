# SPDX-License-Identifier: Apache-2.0
"""Console output: the logger `mir_callback`, and the lines of a run.

Everything goes through `logging.getLogger("mir_callback")`: silence it with `setLevel(logging.ERROR)`, or replace its
handler. Lines that are the same on all ranks are written by rank 0 only.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from tqdm.auto import tqdm

from mir_callback import distributed
from mir_callback.config import MIRConfig
from mir_callback.early_stopping import Verdict
from mir_callback.lr_schedule import epoch_starts
from mir_callback.record import EvalRecord
from mir_callback.schedule import TimeShare

log = logging.getLogger("mir_callback")

_LINE_LENGTH = 100 - len("[mir] ")
_FEW_SAMPLES = 20  # the paper's figure 5


class ConsoleHandler(logging.Handler):
    """Writes rank 0's lines, `[mir] ...`, to stdout, and warnings of every rank to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line above the progress bars."""
        is_warning, rank = record.levelno >= logging.WARNING, distributed.rank()
        if rank > 0 and not is_warning:
            return
        line = f"[mir] {f'rank {rank}: ' if rank > 0 else ''}{'WARNING: ' if is_warning else ''}{record.getMessage()}"
        with suppress(OSError, ValueError):  # a full disk behind stdout, a closed pipe
            tqdm.write(line, file=sys.stderr if is_warning else sys.stdout)


def _set_up() -> None:
    """Configure the logger, unless the user has given it a handler or a level already."""
    if not log.handlers:
        log.addHandler(ConsoleHandler())
        log.propagate = False  # a script that configures the root logger would show each line twice
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)


def evaluation_line(record: EvalRecord, verdict: Verdict | None, earlier: Iterable[EvalRecord] = ()) -> str:
    """One evaluation in one line of at most 100 characters; the verdict's reason is in the history.

    Args:
        record: the evaluation.
        verdict: of the stop rule on it, None without a rule.
        earlier: the run's evaluations before it, for the change of MIR since the last one with a value.

    Ranks: pure.

    Example:
        >>> record = EvalRecord(step=490, mir=2.1097, mir_se=0.0095, seconds=0.68)
        >>> evaluation_line(record, None, [EvalRecord(step=480, mir=2.123)])
        'step 490: MIR 2.1097 +- 0.0095 (-0.0133), 0.7 s'
    """
    if record.mir is None:
        return f"step {record.step}: evaluation failed: {' '.join(str(record.error).split())}"[:_LINE_LENGTH]
    before = [old.mir for old in earlier if old.mir is not None]
    parts = [f"step {record.step}: MIR {record.mir:.4f}"]
    parts[0] += "" if record.mir_se is None else f" +- {record.mir_se:.4f}"
    parts[0] += f" ({record.mir - before[-1]:+.4f})" if before else ""
    if record.vision_gain is not None:
        parts.append(f"vision gain {record.vision_gain:.2f}")
    if verdict is not None:
        what = {"plateau": ": stopping" if verdict.stop else ": observing only"}.get(verdict.kind, "")
        parts.append((verdict.summary or verdict.kind) + what)
    return ", ".join([*parts, f"{record.seconds or 0.0:.1f} s"])[:_LINE_LENGTH]


def start_notes(
    config: MIRConfig,
    num_samples: int,
    total_steps: int | None,
    total_epochs: float | None,
    drops: Sequence[int] = (),
) -> list[str]:
    """What a user should know before the first step, a sentence each.

    Args:
        config: of the run.
        num_samples: of the probe.
        total_steps: optimizer steps of the run to come, if known.
        total_epochs: epochs of it, if known.
        drops: steps at which the learning rate will drop.

    Ranks: pure.
    """
    notes = []
    if num_samples < _FEW_SAMPLES:
        notes.append(
            f"the probe has {num_samples} samples: below {_FEW_SAMPLES} MIR fluctuates and is biased upwards; use 100"
        )
    if not config.may_stop:
        return notes
    stop, planned = config.stop, config.planned_steps(total_steps, total_epochs)
    ahead = [*drops, *epoch_starts(total_steps, total_epochs)]
    waits = bool(getattr(stop, "wait_for_schedule", False))
    if ahead:
        drop = ", ".join(map(str, drops[:3])) + " and later" * (len(drops) > 3)
        why = f"the learning rate will drop at step {drop}" if drops else f"the run has {total_epochs:.4g} epochs"
        then = (
            f"waits for step {max(ahead)}; wait_for_schedule=False ends it before" if waits else "does not wait for it"
        )
        notes.append(f"{why}: MIR may fall again there, and the stop rule {then}")
    is_counted = planned is not None and not {"evaluate", "save"} & set(config.also_on)
    if planned is None or not is_counted:
        return notes
    needed, window = getattr(stop, "min_evaluations", 0), getattr(stop, "window", 0)
    late = [step for step in planned if step > max(ahead)] if ahead and waits else planned
    if len(planned) < needed or len(late) < window:
        after = f" after step {max(ahead)}" if len(planned) >= needed else ""
        notes.append(
            f"the stop rule can't stop this run: {len(late) if after else len(planned)} evaluations are planned{after} "
            f"and it needs {window if after else needed}; evaluate more often (every=), or lower its warmup and window"
        )
    return notes


def dry_run_lines(report: Any, config: MIRConfig, total_steps: int | None, total_epochs: float | None) -> list[str]:
    """The lines of a dry run.

    Args:
        report: of the evaluation that was made.
        config: of the run to come.
        total_steps: optimizer steps of it, if known.
        total_epochs: epochs of it, if known.

    Ranks: pure.
    """
    ranks = f"{report.world_size} rank{'s' * (report.world_size > 1)}"
    return [
        f"dry run: MIR {report.mir:.4f} of the weights as they are, {report.num_samples} samples, "
        f"{report.num_vision_tokens} vision and {report.num_text_tokens} text tokens, {report.dtype}",
        f"one evaluation: {report.seconds:.1f} s on {ranks}, {report.peak_memory_bytes / 1e9:.2f} GB more at its peak",
        f"the run: {_plan(report.seconds, config, total_steps, total_epochs)}",
        "no step was trained and no history was written; remove dry_run (--mir_dry_run) to train",
    ]


def _plan(seconds: float, config: MIRConfig, total_steps: int | None, total_epochs: float | None) -> str:
    schedule, planned = config.schedule, config.planned_steps(total_steps, total_epochs)
    if isinstance(schedule, TimeShare):
        pause = seconds * (1 - schedule.share) / schedule.share
        parts = [f"one evaluation after every {pause:.0f} s of training at most ({schedule.share:.3g} of the time)"]
    elif planned is not None:
        cost = f"about {len(planned) * seconds:.0f} s in all"
        parts = [f"{len(planned)} evaluations in {total_steps} steps with {schedule}, {cost}"]
    else:
        parts = [f"{schedule}, number of steps unknown"]
    more = [f"one at each {event}" for event in ("evaluate", "save") if event in config.also_on]
    return ", and ".join([*parts, *more])


_set_up()
