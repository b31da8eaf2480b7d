# SPDX-License-Identifier: Apache-2.0
"""A run as it is found on disk: its evaluations, its training loss, and what is wrong with them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mir_callback.best_model import NOTE_NAME
from mir_callback.errors import ConfigError, HistoryError
from mir_callback.history import FILE_NAME, Record, parse_record
from mir_callback.metric.frechet import ROOTS

_MOST_STEPS = 2**53
_LISTED = 3  # findings of one kind that are told one by one


def read_records(path: str | Path) -> tuple[list[Record], list[str]]:
    """Read a history file of any origin.

    Unlike `read_history`, which a run is continued from, this leaves out damaged lines wherever they stand, and fields
    that cannot be what their name says. Steps are put in order; of several records of one step the last one counts.

    Args:
        path: the file, one JSON object a line.

    Returns:
        Records that have passed :func:`cleaned`, by step; and what was found wrong, in sentences.

    Raises:
        HistoryError: there is no such file, or it cannot be read.

    Ranks: any.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise HistoryError(f"{path} must be a readable history file, got {error.strerror or error}") from error
    records: list[Record] = []
    damaged: list[str] = []
    fields: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(cleaned(parse_record(line), fields))
        except (ValueError, RecursionError) as error:
            damaged.append(f"line {number} is left out, it is no record ({error}): {line.strip()!r:.60}")
    ordered, order = in_order(records)
    return ordered, [*_few(damaged, "damaged lines"), *_few(fields, "damaged fields"), *order]


def cleaned(record: Mapping[str, Any], told: list[str]) -> Record:
    """A record whose known fields are what their names say, or null.

    Args:
        record: with a whole `step` and a `mir` that is a number or None.
        told: gets a sentence for each field that is left out.

    Returns:
        A copy. Fields of other names are as they were.

    Raises:
        ValueError: its step is negative, or no number of steps that anyone takes.

    Ranks: pure.
    """
    if not 0 <= record["step"] < _MOST_STEPS:
        raise ValueError("its step is negative or beyond all runs")
    kept = dict(record)
    for field, value in record.items():
        rule = _RULES.get(field)
        if rule is None or value is None or rule[1](value):
            continue
        kept.pop(field)
        told.append(f"step {record['step']}: {field} is left out, it must be {rule[0]}, got {value!r:.60}")
    kept.setdefault("mir", None)
    influences = kept.get("influences")
    if influences is not None and kept.get("num_samples") not in (None, len(influences)):
        del kept["influences"]
        told.append(
            f"step {record['step']}: influences are left out, there are {len(influences)} of them for "
            f"{kept['num_samples']} samples"
        )
    return kept


def in_order(records: list[Record]) -> tuple[list[Record], list[str]]:
    """Records by step, the last one of each; and what had to be put right, in sentences. Ranks: pure."""
    told = []
    steps = [record["step"] for record in records]
    if steps != sorted(steps):
        told.append("its steps do not increase; they are put in order")
    by_step = {record["step"]: record for record in records}
    if len(by_step) < len(records):
        told.append(f"{len(records) - len(by_step)} records are left out, a later one has the same step")
    unknown = sorted({str(record["root"]) for record in records if record.get("root") not in (None, *ROOTS)})
    if unknown:
        told.append(
            f"root {', '.join(map(repr, unknown))} is unknown here (known: {', '.join(ROOTS)}); such values are like "
            "none of another root"
        )
    return [by_step[step] for step in sorted(by_step)], told


def noted_losses(records: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, float], ...]:
    """Training losses that evaluations have noted, (step, loss), each at the step it was logged at. Ranks: pure."""
    by_step = {
        record["step"] if record.get("loss_step") is None else record["loss_step"]: float(record["loss"])
        for record in records
        if record.get("loss") is not None
    }
    return tuple((step, by_step[step]) for step in sorted(by_step))


def is_number(value: object) -> bool:
    """Whether a value is a finite number. Ranks: pure."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _is_amount(value: object) -> bool:
    return is_number(value) and value >= 0  # type: ignore[operator]


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_truth(value: object) -> bool:
    return isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_number, value))


def _are_amounts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_amount, value))


def _are_lists(value: object) -> bool:
    return isinstance(value, dict) and all(map(_are_numbers, value.values()))


_Rule = tuple[str, Callable[[object], bool]]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("mir", "time"), ("a finite number", is_number)),
    **dict.fromkeys(
        ("epoch", "seconds", "mir_se", "elapsed", "train_seconds", "eval_seconds", "tokens_seen", "samples_seen")
        + ("peak_memory_bytes", "probe_loss", "expected_gain_se", "max_steps"),
        ("a number of at least 0", _is_amount),
    ),
    **dict.fromkeys(("loss", "mir_extrapolated", "expected_gain"), ("a finite number", is_number)),
    "would_stop": ("true or false", _is_truth),
    **dict.fromkeys(
        ("loss_step", "num_samples", "num_vision_tokens", "num_text_tokens", "world_size"),
        ("a whole number", _is_count),
    ),
    **dict.fromkeys(("per_layer", "per_layer_se"), ("a list of numbers of at least 0", _are_amounts)),
    "influences": ("a list of numbers", _are_numbers),
    "companions": ("an object of lists of numbers", _are_lists),
    **dict.fromkeys(
        ("root", "probe_fingerprint", "tokens_fingerprint", "pixels_fingerprint", "dtype", "verdict", "reason")
        + ("error",),
        ("text", _is_text),
    ),
}


def _few(findings: list[str], what: str) -> list[str]:
    """The first findings, and how many more there are."""
    more = len(findings) - _LISTED
    return findings if more <= 0 else [*findings[:_LISTED], f"{more} more {what} are left out"]


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


Kind = Literal["folder", "checkpoint", "history"]


@dataclass(frozen=True)
class Run:
    """One run, read from disk; it may still be training.

    Attributes:
        name: what to call it; unique among runs read together.
        path: as the user gave it.
        kind: what was found there: the output folder of a run, a checkpoint in it, a history file.
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
    """Read a run from its output folder, its history file, or one of its checkpoints.

    Args:
        path: an output folder with `mir_history.jsonl`; such a file under any name; a `checkpoint-N` or `mir_best`
            folder of a run.
        name: what to call it; by default after its folder.

    Returns:
        The run. It may have no evaluations, which its problems say.

    Raises:
        HistoryError: there is nothing, or nothing of these.
        ConfigError: the path is empty.

    Ranks: any.
    """
    if str(path) == "":
        raise ConfigError("RUN must not be empty, got ''; is a shell variable unset?")
    path = Path(os.path.expanduser(path))
    if not os.path.exists(path):  # which says no to a name that is too long, where the method raises
        raise HistoryError(
            f"RUN must be a run's output folder, history file or checkpoint, got {path}: there is no such file"
        )
    if path.is_file():
        run = _from_history(path, path, "history")
    elif (path / FILE_NAME).is_file():
        run = _from_history(path, path / FILE_NAME, "folder")
    elif (step := _checkpoint_step(path)) is not None and (folder := _folder_of(path)) is not None:
        run = _from_checkpoint(path, folder, step)
    else:
        raise _not_a_run(path)
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


def _not_a_run(folder: Path) -> HistoryError:
    """Why a folder is not one run, and what to name instead."""
    children = sorted(child for child in folder.iterdir() if (child / FILE_NAME).is_file())
    if children:
        return HistoryError(
            f"RUN must be one run, got {folder} with {len(children)} in it; name them, e.g. {children[0]}"
        )
    if _checkpoint_step(folder) is not None:
        return HistoryError(
            f"{folder} is a checkpoint of a run without {FILE_NAME} beside it: MIR was not measured in that run; "
            "mir eval measures it"
        )
    return HistoryError(
        f"RUN must be a run's output folder, history file or checkpoint, got {folder}, which holds no {FILE_NAME}; "
        "of a wandb run download its artifact and name that folder"
    )
