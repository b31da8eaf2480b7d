# SPDX-License-Identifier: Apache-2.0
"""A dry run: one evaluation before the first step, what it cost, what the schedule would cost, and the end."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mir_callback import distributed as collectives
from mir_callback.evaluation.evaluate import MIRReport
from mir_callback.schedule import Schedule, TimeShare, due_steps

_GIB = 2**30


class DryRunDone(SystemExit):
    """Ends the script after a dry run, with exit code 0, before it can train or save anything."""

    def __init__(self) -> None:
        super().__init__(0)


@dataclass(frozen=True)
class Peak:
    """The highest memory of any rank, in bytes.

    Attributes:
        host: of the process so far.
        device: of the GPU's tensors during the evaluation; None without a GPU.
        before: of the GPU's tensors before it.
    """

    host: int
    device: int | None = None
    before: int = 0

    @classmethod
    def begin(cls) -> int:
        """Start to measure; the bytes that GPU tensors take now. Ranks: each for itself."""
        if not _on_gpu():
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    @classmethod
    def end(cls, before: int) -> Peak:
        """What was measured, over all ranks. Ranks: collective."""
        unit = 1 if sys.platform == "darwin" else 1024
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        device = torch.cuda.max_memory_allocated() if _on_gpu() else None
        everyone = collectives.gather_objects((host, device, before))
        devices = [theirs for _, theirs, _ in everyone if theirs is not None]
        return cls(max(h for h, _, _ in everyone), max(devices, default=None), max(b for _, _, b in everyone))


def rehearse(
    evaluate: Callable[[], MIRReport], schedule: Schedule, events: tuple[str, ...], max_steps: int, epochs: float
) -> str:
    """Evaluate once.

    Args:
        evaluate: the evaluation.
        schedule: of the run to come.
        events: evaluated besides.
        max_steps: optimizer steps of the run to come, 0 or less if unknown.
        epochs: epochs of it.

    Returns:
        What it cost and what the run's evaluations will, in lines.

    Ranks: collective.
    """
    before = Peak.begin()
    report = evaluate()
    return summary(report, Peak.end(before), schedule, events, max_steps, epochs)


def epochs_of(max_steps: int, dataloader: Any, accumulation: int) -> float:
    """How many epochs ``max_steps`` are; the Trainer takes a loader without a length for one epoch."""
    try:
        return max_steps / math.ceil(len(dataloader) / accumulation)
    except (TypeError, ZeroDivisionError):
        return 1.0


def summary(
    report: MIRReport, peak: Peak, schedule: Schedule, events: tuple[str, ...], max_steps: int, epochs: float
) -> str:
    """What a dry run prints, see :func:`rehearse`. Pure."""
    lines = [
        f"dry run: MIR {report.mir:.4f} of the weights as they are, {report.num_samples} samples, "
        f"{report.num_vision_tokens} vision and {report.num_text_tokens} text tokens, {report.dtype}",
        f"one evaluation: {report.seconds:.1f} s on {report.world_size} rank{'s' * (report.world_size > 1)}; "
        f"{_memory(peak)}",
        f"the run: {_plan(report.seconds, schedule, events, max_steps, epochs)}",
        "no step was trained and no history was written; leave dry_run (--mir_dry_run) out to train",
    ]
    return "\n".join(f"[mir] {line}" for line in lines)


def _memory(peak: Peak) -> str:
    host = f"peak memory of a process {peak.host / _GIB:.1f} GiB"
    if peak.device is None:
        return host
    return f"peak GPU memory {peak.device / _GIB:.1f} GiB, {peak.before / _GIB:.1f} GiB before it; {host}"


def _plan(seconds: float, schedule: Schedule, events: tuple[str, ...], max_steps: int, epochs: float) -> str:
    more = [f"one at each {event}" for event in ("evaluate", "save") if event in events]
    if isinstance(schedule, TimeShare):
        pause = seconds * (1 - schedule.share) / schedule.share
        parts = [f"one evaluation after every {pause:.0f} s of training at most ({schedule.share:.3g} of the time)"]
    elif max_steps > 0:
        count = _count(schedule, events, max_steps, epochs)
        parts = [f"{count} evaluations in {max_steps} steps with {schedule}, about {count * seconds:.0f} s in all"]
    else:
        parts = [f"{schedule}, number of steps unknown"]
    return ", and ".join([*parts, *more])


def _count(schedule: Schedule, events: tuple[str, ...], max_steps: int, epochs: float) -> int:
    steps = set(due_steps(schedule, max_steps, epochs))
    return len(steps | ({0} if "start" in events else set()) | ({max_steps} if "end" in events else set()))


def _on_gpu() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()
