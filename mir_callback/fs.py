# SPDX-License-Identifier: Apache-2.0
"""Files that are whole at every moment: written beside their place, flushed to the disk, renamed there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file that a reader, or a process killed meanwhile, never finds half written.

    Args:
        path: the file; its folder must exist. An existing file, or a link of that name, is replaced.
        content: bytes, or text that is written as UTF-8.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with new.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A place to write ``path`` before it is renamed there, in a folder beside it that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Path(folder) / path.name


def free_name(path: Path) -> Path:
    """``name.1.suffix``, or with the first number that is free: where something older is moved aside to."""
    number = 1
    while (candidate := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return candidate


def fsync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
