# SPDX-License-Identifier: Apache-2.0
"""Files that a subcommand writes: whole or not at all, and never over what runs have measured."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mir_callback.analysis.runs import Run
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
