# SPDX-License-Identifier: Apache-2.0
"""Read a run from disk: its evaluations and training loss, and what could not be read."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mir_callback.errors import ConfigError, HistoryError
from mir_callback.fs import printable, require_file
from mir_callback.history import FILE_NAME, LayersOf, read_records
from mir_callback.record import EvalRecord, is_count, is_number

Series = tuple[tuple[int, float], ...]  # (step, value), by step
Seed = tuple[int, int | None]  # of the run, and of the order of its data if that has one of its own

_TRAINER_STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]{0,14})")


@dataclass(frozen=True)
class Run:
    """One run, read from disk; it may still be training."""

    name: str  # unique among runs read together; control characters are escaped
    path: Path  # as the user gave it
    source: Path  # the file its records come from
    records: tuple[EvalRecord, ...]  # sorted by step; of a checkpoint those up to its step
    losses: Series = ()  # (step, training loss)
    tokens: Series = ()  # (step, input tokens seen so far), if the Trainer counts them
    max_steps: float | None = None  # planned length, if known
    problems: tuple[str, ...] = ()  # messages about what was skipped

    @cached_property
    def measured(self) -> tuple[EvalRecord, ...]:
        """The evaluations that have a MIR."""
        return tuple(record for record in self.records if record.mir is not None)

    @cached_property
    def planned(self) -> tuple[EvalRecord, ...]:
        """All evaluations with the planned length, which older records and those of `mir eval` lack."""
        return tuple(
            replace(record, max_steps=self.max_steps) if record.max_steps is None else record for record in self.records
        )

    @cached_property
    def seeds(self) -> tuple[Seed | None, ...]:
        """What it was seeded with, as its evaluations say: several if it was resumed with others; None if unknown."""
        found = ((record.seed, record.data_seed) for record in self.measured)
        return tuple(dict.fromkeys(None if seed is None else (seed, data) for seed, data in found))

    @property
    def seed(self) -> Seed | None:
        """The one seed of all its evaluations; None if that is unknown or there are several."""
        return self.seeds[0] if len(self.seeds) == 1 else None


def read_run(path: str | Path, layers_of: LayersOf | None = None) -> Run:
    """Read a run from its output folder, its history file, or one of its checkpoints.

    Args:
        path: a folder with `mir_history.jsonl` (output folder, downloaded wandb artifact), a history file under any
            name, or a `checkpoint-N` or `mir_best` folder of a run (then only the records up to its step are read).
        layers_of: given the records, returns those whose values of layers are wanted; default: all.

    Returns:
        The run; ``problems`` says what was skipped, and if there are no evaluations.

    Raises:
        HistoryError: there is no history at this path.
        ConfigError: the path is empty.

    Ranks: pure.

    Example:
        ```
        run = read_run("runs/demo")
        print([(record.step, record.mir) for record in run.measured])
        ```
    """
    if str(path) == "":
        raise ConfigError("A run's path is empty. Is a shell variable unset?")
    path = Path(os.path.expanduser(path))
    source, step = _find_history(path)
    end = math.inf if step is None else step
    wanted = layers_of and (lambda found: layers_of([record for record in found if record.step <= end]))
    records, problems = read_records(source, wanted)
    if step is not None:
        log = _read_trainer_log(path.resolve()).until(step)
        name = f"{source.parent.name}/{os.path.basename(os.path.abspath(path))}"
        records = [record for record in records if record.step <= step]
        if not any(record.step == step and record.mir is not None for record in records):
            problems.append(f"{path}: MIR was not measured at its step {step}, the last value is from an earlier one")
    elif source.name == FILE_NAME:
        folder = source.resolve().parent
        log, name = _read_trainer_log(folder), folder.name
    else:  # beside a history of another name may lie anything
        log, name = _TrainerLog(), source.stem
    problems += log.problems
    if not any(record.mir is not None for record in records):
        why = "all evaluations failed" if records else "it has no evaluations"
        problems.append(f"no MIR in {source}: {why}")
    tokens = tuple((record.step, record.tokens_seen) for record in records if record.tokens_seen is not None)
    planned = next((record.max_steps for record in reversed(records) if record.max_steps), log.max_steps)
    losses = log.losses or noted_losses(records)
    return Run(printable(name), path, source, tuple(records), losses, tokens or log.tokens, planned, tuple(problems))


def read_runs(paths: Sequence[str | Path], layers_of: LayersOf | None = None) -> tuple[list[Run], list[str]]:
    """Read several runs, in the order given; also returns messages about those that could not be read."""
    runs, missing = [], []
    for path in paths:
        try:
            runs.append(read_run(path, layers_of))
        except (HistoryError, OSError) as error:
            missing.append(str(error))
    return make_names_unique(runs), missing


def make_names_unique(runs: Sequence[Run]) -> list[Run]:
    """Tell runs of the same name apart by as many parent folders as needed, or else by a number."""
    names = [run.name for run in runs]
    resolved = [run.path.resolve() for run in runs]
    folders = [path.parent if path.name == FILE_NAME else path for path in resolved]
    for depth in range(2, max((len(folder.parts) for folder in folders), default=0)):
        before = list(names)
        for index, folder in enumerate(folders):
            alike = {other for other, name in zip(folders, before, strict=True) if name == before[index]}
            if len(alike) > 1:
                names[index] = printable("/".join(folder.parts[-depth:]))
    seen = [names[:index].count(name) for index, name in enumerate(names)]
    counted = [f"{name} ({times + 1})" if times else name for name, times in zip(names, seen, strict=True)]
    return [replace(run, name=name) for run, name in zip(runs, counted, strict=True)]


def noted_losses(records: Sequence[EvalRecord]) -> Series:
    """The training losses in the records, each at the step it was logged at."""
    known = [record for record in records if record.loss is not None]
    return _by_step((record.step if record.loss_step is None else record.loss_step, record.loss) for record in known)


@dataclass(frozen=True)
class _TrainerLog:
    """Losses, input tokens and planned steps from a Trainer's state, and what could not be read."""

    losses: Series = ()
    tokens: Series = ()
    max_steps: int | None = None
    problems: tuple[str, ...] = ()

    def until(self, step: int) -> _TrainerLog:
        """The log up to a step."""
        losses, tokens = (tuple(point for point in series if point[0] <= step) for series in (self.losses, self.tokens))
        return replace(self, losses=losses, tokens=tokens)


def _read_trainer_log(folder: Path) -> _TrainerLog:
    """The Trainer's log in the folder itself, or else in its newest checkpoint with a readable one."""
    checkpoints = [child for child in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(child.name)]
    newest = sorted(checkpoints, key=lambda child: int(child.name.rpartition("-")[2]), reverse=True)
    problems: list[str] = []
    for file in [parent / _TRAINER_STATE for parent in (folder, *newest) if (parent / _TRAINER_STATE).is_file()]:
        state = _read_object(file)
        if not isinstance(state.get("log_history"), list):
            problems.append(f"skipped {file}: not a Trainer's state")
            continue
        rows = [row for row in state["log_history"] if isinstance(row, dict) and is_count(row.get("step"))]
        losses, tokens = (
            _by_step((row["step"], row[name]) for row in rows if is_number(row.get(name)))
            for name in ("loss", "num_input_tokens_seen")
        )
        planned = state.get("max_steps")
        return _TrainerLog(losses, tokens, planned if planned and is_count(planned) else None, tuple(problems))
    return _TrainerLog(problems=tuple(problems))


def _read_object(path: Path) -> dict[str, Any]:
    """A file's JSON object; empty if it cannot be read."""
    try:
        require_file(path)
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _by_step(points: Any) -> Series:
    """Points sorted by step; the last one of each step."""
    return tuple(sorted({step: float(value) for step, value in points}.items()))


def _find_history(path: Path) -> tuple[Path, int | None]:
    """The history file of a run, and the checkpoint's step if the path is one."""
    if not os.path.exists(path):  # Path.exists raises if a name is too long
        raise HistoryError(f"{path} does not exist. Name a run's output folder, history file or checkpoint.")
    if path.is_file():
        return path, None
    if (path / FILE_NAME).is_file():
        return path / FILE_NAME, None
    step = _find_checkpoint_step(path)
    if step is not None:
        for folder in (Path(os.path.abspath(path)).parent, path.resolve().parent):  # beside the link, or its target
            if (folder / FILE_NAME).is_file():
                return folder / FILE_NAME, step
    runs = sorted(child for child in path.iterdir() if (child / FILE_NAME).is_file())
    if runs:
        raise HistoryError(f"{path} is a folder of {len(runs)} runs. Name the runs, e.g. {runs[0]}")
    if step is not None:
        raise HistoryError(
            f"{path} is a checkpoint of a run without {FILE_NAME}: MIR was not measured in training. Use mir eval."
        )
    raise HistoryError(
        f"Found no {FILE_NAME} in {path}. Name a run's output folder, history file or checkpoint, or the folder of its "
        "downloaded wandb artifact."
    )


def _find_checkpoint_step(folder: Path) -> int | None:
    """The step of a checkpoint; None if the folder is not one."""
    for name in (os.path.basename(os.path.abspath(folder)), folder.resolve().name):
        if match := _CHECKPOINT.fullmatch(name):
            return int(match[1])
    from mir_callback.best_model import NOTE_NAME  # imports torch

    for name, key in ((NOTE_NAME, "step"), (_TRAINER_STATE, "global_step")):
        found = _read_object(folder / name)
        step = found.get(key)
        if is_count(step) and is_count(found.get("discarded")):
            raise HistoryError(
                f"{folder} has weights of step {step} that the run has left by resuming at step {found['discarded']}: "
                f"its history is not theirs. Name a copy of the history that reaches step {step}."
            )
        if is_count(step):
            return step
    return None
