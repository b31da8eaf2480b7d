# SPDX-License-Identifier: Apache-2.0
"""Runs, recipes and output files as command line arguments."""

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
from mir_callback.history import LayersOf

RUNS = """\
A RUN is an output folder, a history file, a checkpoint of a run, or the folder of a run's wandb artifact.
NAME=RUN,RUN,... is a recipe: runs that differ only in the seed. Patterns work too: NAME='runs/a_seed*'."""


def read_recipes(words: Sequence[str], layers_of: LayersOf) -> tuple[list[Recipe], list[str]]:
    """Read the recipes of some arguments, with the values of layers of some of their evaluations (see `read_run`).

    Also returns messages about runs that could not be read.
    """
    groups = [(name, *read_runs(paths, layers_of)) for name, paths in map(_split, words)]
    missing = [message for _, _, failed in groups for message in failed]
    distinct = iter(make_names_unique([run for _, runs, _ in groups for run in runs]))
    recipes = []
    for name, runs, _ in groups:
        if own := tuple(islice(distinct, len(runs))):
            recipes.append(Recipe(name or own[0].name, own))
    names = [recipe.name for recipe in recipes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"Two recipes are called {', '.join(twice)}. Rename one.")
    return recipes, missing


def _split(word: str) -> tuple[str | None, list[str]]:
    """The name (None for a plain run) and the run paths of an argument."""
    if os.path.exists(os.path.expanduser(word)) or "=" not in word:
        return None, [word]
    name, _, rest = word.partition("=")
    # A pattern without matches is kept, and reported as missing when it is read.
    paths = [path for part in rest.split(",") if part for path in sorted(glob.glob(os.path.expanduser(part))) or [part]]
    if not name or not paths:
        raise ConfigError(f"{word!r} is neither a path nor NAME=RUN,RUN,... such as long=runs/long_1,runs/long_2")
    return name, paths


def check_output(flag: str, words: str, runs: Sequence[Run] = ()) -> Path:
    """The output file of a flag, links resolved; ConfigError if it is no file, or one with measured values."""
    if not words or words == "-":
        raise ConfigError(f"{flag} needs the name of a file, got {words!r}")
    path = Path(os.path.realpath(os.path.expanduser(words)))
    if path.is_dir():
        raise ConfigError(f"{flag} {words} is a folder. Add the name of a file.")
    if path.exists() and not path.is_file():
        raise ConfigError(f"{flag} {words} is not a regular file. Choose another.")
    if path.suffix == ".jsonl" or path in {run.source.resolve() for run in runs}:
        raise ConfigError(f"{flag} {words} would overwrite measured values. Choose another name.")
    return path


def write_output(flag: str, path: Path, text: str) -> None:
    """Write a file atomically; ConfigError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text.encode(errors="backslashreplace"))  # folder names may not be valid text
    except OSError as error:
        raise ConfigError(f"Could not write {path} ({flag}): {error.strerror or error}. Choose another.") from error
