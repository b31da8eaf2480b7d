# SPDX-License-Identifier: Apache-2.0
"""Runs and recipes as they are named on a command line, and files to write."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from mir_callback.analysis.compare import Recipe
from mir_callback.analysis.load import Run, make_names_unique, read_runs
from mir_callback.errors import ConfigError
from mir_callback.fs import write_atomic

RUNS = """\
A RUN is an output folder, a history file, a checkpoint in a run's folder, or the folder of a run's wandb artifact.
NAME=RUN,RUN,... is a recipe: runs that differ in nothing but the seed; patterns such as NAME='runs/a_seed*' will do."""


def read_recipes(words: Sequence[str]) -> tuple[list[Recipe], list[str]]:
    """The recipes that words name, and what could not be read, in sentences; ConfigError if a word names nothing."""
    groups = [(name, *read_runs(paths)) for name, paths in map(_split, words)]
    missing = [message for _, _, failed in groups for message in failed]
    distinct = iter(make_names_unique([run for _, runs, _ in groups for run in runs]))
    recipes = []
    for name, runs, _ in groups:
        if own := tuple(islice(distinct, len(runs))):
            recipes.append(Recipe(name or own[0].name, own))
    names = [recipe.name for recipe in recipes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"there are two recipes called {', '.join(twice)}; call one otherwise")
    return recipes, missing


def _split(word: str) -> tuple[str | None, list[str]]:
    """A recipe's name and the paths of its runs; no name for a plain run."""
    if os.path.exists(os.path.expanduser(word)) or "=" not in word:
        return None, [word]
    name, _, rest = word.partition("=")
    # A pattern that matches nothing stays as it is: reading it says that it does not exist.
    paths = [path for part in rest.split(",") if part for path in sorted(glob.glob(os.path.expanduser(part))) or [part]]
    if not name or not paths:
        raise ConfigError(f"{word!r} is neither a path nor NAME=RUN,RUN,...; write e.g. long=runs/long_1,runs/long_2")
    return name, paths


def check_output(flag: str, words: str, runs: Sequence[Run] = ()) -> Path:
    """The file that a flag names, links followed; ConfigError if it cannot be one, or holds what a run has measured."""
    if not words or words == "-":
        raise ConfigError(f"{flag} needs the name of a file to write, got {words!r}")
    path = Path(os.path.realpath(os.path.expanduser(words)))
    if path.is_dir():
        raise ConfigError(f"{flag} {words} is a folder; add the name of a file")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{flag} {words} is no regular file; name another")
    if path.suffix == ".jsonl" or path in {run.source.resolve() for run in runs}:
        raise ConfigError(f"{flag} {words} would write over measured values; choose another name")
    return path


def write_output(flag: str, path: Path, text: str) -> None:
    """Write a file so that nobody ever reads half of it; ConfigError if it cannot be written, what was there stays."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode(errors="backslashreplace"))  # names of folders need not be text
    except OSError as error:
        raise ConfigError(f"{flag} cannot be written to {path}: {error.strerror or error}; choose another") from error
