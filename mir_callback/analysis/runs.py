# SPDX-License-Identifier: Apache-2.0
"""A run as it is found on disk: its evaluations, its training loss, and what is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mir_callback.analysis.records import noted_losses, read_records
from mir_callback.analysis.trainer_log import CHECKPOINT, STATE, TrainerLog, json_object, log_of, log_of_wandb
from mir_callback.analysis.wandb_file import read_wandb, records_of
from mir_callback.errors import ConfigError, HistoryError
from mir_callback.training.checkpoint import NOTE_NAME
from mir_callback.training.history import FILE_NAME, Record

Kind = Literal["folder", "checkpoint", "history", "wandb"]


@dataclass(frozen=True)
class Run:
    """One run, read from disk; it may still be training.

    Attributes:
        name: what to call it; unique among runs read together.
        path: as the user gave it.
        kind: what was found there: the output folder of a run, a checkpoint in it, a history file, a wandb run.
        source: the file its records come from.
        records: its evaluations by increasing step, those of a checkpoint up to the checkpoint's step. Known fields
            are what their names say or missing (see `cleaned`), `mir` is None where an evaluation failed.
        losses: (step, training loss) by step; empty if none was found.
        tokens: (step, input tokens seen so far) by step, where the Trainer has counted them.
        max_steps: steps the run was planned for, or None if that is not known.
        problems: what was found wrong, in sentences; reading went on without it.
    """

    name: str
    path: Path
    kind: Kind
    source: Path
    records: tuple[Record, ...]
    losses: tuple[tuple[int, float], ...] = ()
    tokens: tuple[tuple[int, float], ...] = ()
    max_steps: int | None = None
    problems: tuple[str, ...] = ()

    @property
    def measured(self) -> tuple[Record, ...]:
        """The evaluations that gave a value."""
        return tuple(record for record in self.records if record["mir"] is not None)


def read_run(path: str | Path, name: str | None = None) -> Run:
    """Read a run from its output folder, its history file, one of its checkpoints, or a wandb run.

    Args:
        path: an output folder with `mir_history.jsonl`; such a file under any name; a `checkpoint-N` or `mir_best`
            folder of a run; a wandb run's folder (`offline-run-*`, `run-*`) or its `.wandb` file.
        name: what to call it; by default after its folder.

    Returns:
        The run. It may have no evaluations, which its problems say.

    Raises:
        HistoryError: there is nothing, or nothing of these.
        ConfigError: wandb is needed and not installed.

    Ranks: any.
    """
    if str(path) == "":
        raise ConfigError("RUN must not be empty, got ''; is a shell variable unset?")
    path = Path(os.path.expanduser(path))
    if not os.path.exists(path):  # which says no to a name that is too long, where the method raises
        raise HistoryError(
            f"RUN must be a run's output folder, history file, checkpoint or wandb run, got {path}: "
            "there is no such file"
        )
    if path.is_file():
        run = _from_wandb(path, path) if path.suffix == ".wandb" else _from_history(path, path, "history")
    elif (path / FILE_NAME).is_file():
        run = _from_history(path, path / FILE_NAME, "folder")
    elif (step := _checkpoint_step(path)) is not None and (folder := _folder_of(path)) is not None:
        run = _from_checkpoint(path, folder, step)
    else:
        run = _from_wandb(path, _wandb_file(path))
    if not run.measured:
        why = "all of its evaluations failed" if run.records else "it is empty"
        run = replace(run, problems=(*run.problems, f"{run.source} holds no value of MIR: {why}"))
    return run if name is None else replace(run, name=name)


def read_runs(paths: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """Read several runs and give each a name of its own; what cannot be read is left out.

    Args:
        paths: as :func:`read_run` takes them.

    Returns:
        The runs, in the order given; and why others are left out, in sentences.

    Ranks: any.
    """
    runs, missing = [], []
    for path in paths:
        try:
            runs.append(read_run(path))
        except HistoryError as error:
            missing.append(str(error))
    return with_names_of_their_own(runs), missing


def with_names_of_their_own(runs: Sequence[Run]) -> list[Run]:
    """Give runs of equal names as many of the folders above as tell them apart, or else a number. Ranks: pure."""
    names = [run.name for run in runs]
    for depth in range(2, max((len(_named_after(run).parts) for run in runs), default=0)):
        before = list(names)
        for index, run in enumerate(runs):
            alike = [other for other, name in zip(runs, before, strict=True) if name == before[index]]
            if len({_named_after(other) for other in alike}) > 1:
                names[index] = "/".join(_named_after(run).parts[-depth:])
    seen = [names[:index].count(name) for index, name in enumerate(names)]
    counted = [f"{name} ({times + 1})" if times else name for name, times in zip(names, seen, strict=True)]
    return [replace(run, name=name) for run, name in zip(runs, counted, strict=True)]


def _named_after(run: Run) -> Path:
    """The path a run is named after."""
    path = run.path.resolve()
    return path.parent if run.kind == "history" and path.name == FILE_NAME else path


def _from_history(path: Path, source: Path, kind: Kind) -> Run:
    records, problems = read_records(source)
    log = log_of(source.resolve().parent) if source.name == FILE_NAME else TrainerLog()
    name = source.resolve().parent.name if source.name == FILE_NAME else source.stem
    return _run(name, path, kind, source, records, log, problems)


def _folder_of(checkpoint: Path) -> Path | None:
    """The folder of the checkpoint's run, where a history is; beside the name itself, or beside what it links to."""
    beside = (Path(os.path.abspath(checkpoint)).parent, checkpoint.resolve().parent)
    return next((folder for folder in beside if (folder / FILE_NAME).is_file()), None)


def _from_checkpoint(path: Path, run: Path, step: int) -> Run:
    """The history of the checkpoint's run, up to the checkpoint."""
    folder = path.resolve()
    source = run / FILE_NAME
    records, problems = read_records(source)
    kept = [record for record in records if record["step"] <= step]
    if not any(record["step"] == step and record["mir"] is not None for record in kept):
        problems.append(f"{path} is of step {step}, where MIR was not measured; its last value is from before")
    log = log_of(folder)
    log = replace(
        log,
        losses=tuple(point for point in log.losses if point[0] <= step),
        tokens=tuple(point for point in log.tokens if point[0] <= step),
    )
    name = f"{run.name}/{os.path.basename(os.path.abspath(path))}"
    return _run(name, path, "checkpoint", source, kept, log, problems)


def _run(
    name: str, path: Path, kind: Kind, source: Path, records: list[Record], log: TrainerLog, problems: Sequence[str]
) -> Run:
    """A run, with what the Trainer logged, or where that is missing with what the records know of it."""
    losses = log.losses or noted_losses(records)
    counted = tuple(
        (record["step"], record["tokens_seen"]) for record in records if record.get("tokens_seen") is not None
    )
    tokens = counted or log.tokens
    planned = next((record["max_steps"] for record in reversed(records) if record.get("max_steps")), log.max_steps)
    return Run(name, path, kind, source, tuple(records), losses, tokens, planned, (*problems, *log.problems))


def _checkpoint_step(folder: Path) -> int | None:
    """The step of a checkpoint's weights, None if the folder is none."""
    for name in (os.path.basename(os.path.abspath(folder)), folder.resolve().name):
        if found := CHECKPOINT.fullmatch(name):
            return int(found[1])
    for name, field in ((NOTE_NAME, "step"), (STATE, "global_step")):
        note = json_object(folder / name)
        if note is not None and type(note.get(field)) is int:
            return int(note[field])
    return None


def _wandb_file(folder: Path) -> Path:
    """The only wandb file in a folder, or in its `wandb` folder."""
    files = sorted(folder.glob("*.wandb"))
    for below in (folder, folder / "wandb"):
        files = files or sorted({file.resolve() for file in below.glob("*run-*/*.wandb")})
    if len(files) == 1:
        return files[0]
    if files:
        raise HistoryError(
            f"RUN must be one run, got {folder} with {len(files)} wandb runs; name one of them: {files[0]}"
        )
    children = sorted(child for child in folder.iterdir() if (child / FILE_NAME).is_file())
    if children:
        raise HistoryError(
            f"RUN must be one run, got {folder} with {len(children)} in it; name them, e.g. {children[0]}"
        )
    if _checkpoint_step(folder) is not None:
        raise HistoryError(
            f"{folder} is a checkpoint of a run without {FILE_NAME} beside it: MIR was not measured in that run; "
            "mir eval measures it"
        )
    raise HistoryError(
        f"RUN must be a run's output folder, history file, checkpoint or wandb run, got {folder}, which holds no "
        f"{FILE_NAME} and no .wandb file"
    )


def _from_wandb(path: Path, source: Path) -> Run:
    found = read_wandb(source)
    records, problems = records_of(found)
    name = found.name or (source.stem if path.is_file() else path.resolve().name)
    return _run(name, path, "wandb", source, records, log_of_wandb(found), [*found.problems, *problems])
