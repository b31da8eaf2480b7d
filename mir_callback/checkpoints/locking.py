# SPDX-License-Identifier: Apache-2.0
"""One process at a time: a lock that other processes on the machine, and on others that share its disk, respect."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mir_callback.errors import HistoryError

try:
    import fcntl
except ImportError:  # where there is no flock, as on Windows
    fcntl = None  # type: ignore[assignment]

PATIENCE_SECONDS = 60.0  # it is held for milliseconds; longer means a process that was stopped
_WAIT_SECONDS = 0.02


@contextmanager
def locked(path: Path, patience: float = PATIENCE_SECONDS) -> Iterator[str | None]:
    """Hold a file's lock, a file `NAME.lock` beside it, which stays: taken away it would not be the same lock for all.

    A process that ends, however it does, lets go of it.

    Args:
        path: the file; its folder must exist.
        patience: seconds to wait for another process.

    Yields:
        None, or why there is no lock: then the block runs without one.

    Raises:
        HistoryError: another process does not let go of it.

    Ranks: any, one process each.
    """
    beside = path.with_name(f"{path.name}.lock")
    try:
        if fcntl is None:
            raise OSError("this system has no flock")
        descriptor = _open(beside)
    except OSError as error:
        yield _unlocked(path, error)
        return
    try:
        problem: str | None = None
        try:
            _wait(descriptor, beside, patience)
        except OSError as error:
            problem = _unlocked(path, error)
        yield problem
    finally:
        os.close(descriptor)  # and so lets go


def _open(beside: Path) -> int:
    """A file to lock; another user's may be readable only, which is enough on a disk of this machine."""
    try:
        return os.open(beside, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        return os.open(beside, os.O_RDONLY)


def _wait(descriptor: int, beside: Path, patience: float) -> None:
    until = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= until:
                raise HistoryError(
                    f"{beside} must be let go of by another process, got none in {patience:g} s; see which holds it "
                    f"(fuser {beside}), or choose another file: --history FILE"
                ) from error
            time.sleep(_WAIT_SECONDS)


def _unlocked(path: Path, error: OSError) -> str:
    return (
        f"{path} is written without a lock ({error}): a second mir eval that writes it at the same time may lose "
        "records; run one after the other, or give each its own --history FILE"
    )
