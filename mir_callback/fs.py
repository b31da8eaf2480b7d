# SPDX-License-Identifier: Apache-2.0
"""Writes that are atomic and follow no link, free names, names fit for a terminal, files that can be read.

Everything in a run's folder is written with these: others may have put links there.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_BYTES = 2**30  # of a history, or of another file that is read as a whole


def require_file(path: Path) -> None:
    """See that reading a file as a whole ends: what others hand over may be a pipe, a device or of any size.

    Raises:
        OSError: there is no file.
        ValueError: it is no regular one, or larger than MAX_BYTES.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is no regular file")
    if found.st_size > MAX_BYTES:
        raise ValueError(f"{path} has {found.st_size} bytes, at most {MAX_BYTES} are read. Is it another file?")


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file so that no reader ever finds half of it, even if the process is killed.

    Args:
        path: the file; its folder must exist. An existing file or link is replaced.
        content: bytes, or text to be encoded as UTF-8.

    Raises:
        OSError: writing failed; an existing file is unchanged.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.new")
    try:
        write_new(new, content)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_new(path: Path, content: bytes | str) -> None:
    """Write a file that does not exist yet, and flush it: whole or not at all.

    Raises:
        FileExistsError: a file or link has this name, which is left alone.
        OSError: writing failed.
    """
    with path.open("xb") as file:
        try:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise
    with contextlib.suppress(OSError):  # not on every system can a folder be flushed
        fsync(path.parent)


def write_beside(path: Path, content: bytes | str) -> Path:
    """Write a file to the first free name beside ``path``; returns it."""
    while True:
        free = free_name(path)
        with contextlib.suppress(FileExistsError):  # taken meanwhile
            write_new(free, content)
            return free


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A temporary path in the same file system as ``path``, to write to and rename from."""
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Path(folder) / path.name


def free_name(path: Path) -> Path:
    """``name.1.suffix``, or the first number that is free: where an older file is moved aside to. A link counts."""
    number = 1
    while os.path.lexists(candidate := path.with_name(f"{path.stem}.{number}{path.suffix}")):
        number += 1
    return candidate


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def printable(text: str) -> str:
    """Text with control characters escaped, which a terminal would obey in the name of a file or run."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
