# SPDX-License-Identifier: Apache-2.0
"""What a Trainer has logged besides MIR, from what it saves and from wandb."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mir_callback.analysis.records import is_number
from mir_callback.analysis.wandb_file import WandbRun

STATE = "trainer_state.json"
CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_TOKENS = "num_input_tokens_seen"

Curve = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class TrainerLog:
    """A Trainer's log.

    Attributes:
        losses: (step, training loss) by step.
        tokens: (step, input tokens seen so far) by step, where the Trainer counts them.
        max_steps: steps the run was planned for, or None if that is not known.
        problems: what could not be read, in sentences.
    """

    losses: Curve = ()
    tokens: Curve = ()
    max_steps: int | None = None
    problems: tuple[str, ...] = ()

    def upto(self, step: int) -> TrainerLog:
        """The part of it that a checkpoint of ``step`` has behind it."""
        losses, tokens = (tuple(point for point in curve if point[0] <= step) for curve in (self.losses, self.tokens))
        return TrainerLog(losses, tokens, self.max_steps, self.problems)


def log_of(folder: Path) -> TrainerLog:
    """What the Trainer has saved of its log: in the folder itself, or else in its newest readable checkpoint.

    Ranks: any.
    """
    checkpoints = [child for child in folder.glob("checkpoint-*") if CHECKPOINT.fullmatch(child.name)]
    newest = sorted(checkpoints, key=lambda child: int(child.name.rpartition("-")[2]), reverse=True)
    problems = []
    for state in (folder / STATE, *(child / STATE for child in newest)):
        if not state.is_file():
            continue
        found = json_object(state)
        entries = None if found is None else found.get("log_history")
        if found is None or not isinstance(entries, list):
            problems.append(f"{state} is left out, it is no Trainer's state")
            continue
        rows = [entry for entry in entries if isinstance(entry, dict)]
        steps = _planned(found.get("max_steps"))
        return TrainerLog(_curve(rows, "step", "loss"), _curve(rows, "step", _TOKENS), steps, tuple(problems))
    return TrainerLog(problems=tuple(problems))


def log_of_wandb(run: WandbRun) -> TrainerLog:
    """What the Trainer has sent to wandb. Ranks: any."""
    axis = "train/global_step"
    losses, tokens = (_curve(run.rows, axis, f"train/{field}") for field in ("loss", _TOKENS))
    return TrainerLog(losses, tokens, _planned(run.config.get("max_steps")))


def json_object(path: Path) -> dict[str, Any] | None:
    """A file's JSON object; None if there is none. Ranks: any."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _planned(steps: Any) -> int | None:
    return steps if type(steps) is int and steps > 0 else None


def _curve(rows: Sequence[Mapping[str, Any]], axis: str, field: str) -> Curve:
    """The numbers of one field over the steps, the last one of each."""
    points = {row[axis]: float(row[field]) for row in rows if type(row.get(axis)) is int and is_number(row.get(field))}
    return tuple((step, points[step]) for step in sorted(points))
