# SPDX-License-Identifier: Apache-2.0
"""Runs and recipes as they are named on a command line."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from mir_callback.analysis.compare import Recipe
from mir_callback.analysis.load import Run, read_runs, with_names_of_their_own
from mir_callback.errors import ConfigError

_MEASURED = (".jsonl", ".wandb")  # histories, and wandb's own files


def output_path(flag: str, words: str, runs: Sequence[Run] = ()) -> Path:
    """The file that a flag names, links followed.

    Args:
        flag: its name, for the error.
        words: its value.
        runs: what is read; their files are not written over.

    Raises:
        ConfigError: it is empty, a folder, no regular file, or holds what a run has measured.
    """
    if not words or words == "-":
        raise ConfigError(f"{flag} must be a file to write, got {words!r}; name one")
    path = Path(os.path.realpath(os.path.expanduser(words)))
    if path.is_dir():
        raise ConfigError(f"{flag} must be a file to write, got {words}, which is a folder; add a name")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{flag} must be a regular file, got {words}; name another")
    if path.suffix in _MEASURED or path in {run.source.resolve() for run in runs}:
        raise ConfigError(f"{flag} must not be a file of measured values, got {words}; choose another name")
    return path


def write_output(flag: str, path: Path, text: str) -> None:
    """Write a file beside its place and rename it there, so that nobody ever reads half of it.

    Raises:
        ConfigError: it cannot be written; what was there stays.
    """
    content = text.encode("utf-8", errors="backslashreplace")  # names of folders need not be text
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(content)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{flag} must be a place to write to, got {path}: {error.strerror or error}; choose another"
        ) from error


RUNS = """\
A RUN is an output folder, a history file, a checkpoint in a run's folder, or a wandb run (folder or .wandb file).
NAME=RUN,RUN,... is a recipe: runs that differ in nothing but the seed; patterns such as NAME='runs/a_seed*' will do."""


def recipes_from(words: Sequence[str]) -> tuple[list[Recipe], list[str]]:
    """The recipes that words of the command line name; and what could not be read, in sentences.

    Raises:
        ConfigError: a recipe without a name or without runs.
    """
    named = [_split(word) for word in words]
    runs: list[Run] = []
    owners: list[int] = []
    missing: list[str] = []
    for index, (_, paths) in enumerate(named):
        found, failed = read_runs(paths)
        runs += found
        owners += [index] * len(found)
        missing += failed
    distinct = with_names_of_their_own(runs)
    recipes = []
    for index, (name, _) in enumerate(named):
        own = [run for run, owner in zip(distinct, owners, strict=True) if owner == index]
        if own:
            recipes.append(Recipe(name or own[0].name, tuple(own)))
    names = [recipe.name for recipe in recipes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"recipes must have names of their own, got {', '.join(twice)} twice; call one otherwise")
    return recipes, missing


def _split(word: str) -> tuple[str | None, list[str]]:
    """A recipe's name and the paths of its runs; no name for a plain run."""
    if os.path.exists(os.path.expanduser(word)) or "=" not in word:
        return None, [word]
    name, _, rest = word.partition("=")
    paths = [path for pattern in rest.split(",") if pattern for path in _matching(pattern)]
    if not name or not paths:
        raise ConfigError(
            f"RUN must be a path or NAME=RUN,RUN,..., got {word!r}; write e.g. long=runs/long_1,runs/long_2"
        )
    return name, paths


def _matching(pattern: str) -> list[str]:
    """What a pattern stands for; a path that is none stays as it is, and is told if it does not exist."""
    return sorted(glob.glob(os.path.expanduser(pattern))) or [pattern]
