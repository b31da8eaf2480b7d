# SPDX-License-Identifier: Apache-2.0
"""The lock on a run's folder: one run writes there at a time, and the system frees it however its process ends."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import socket
import time
import weakref
from pathlib import Path

from mir_callback.errors import HistoryError
from mir_callback.fs import printable

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # Windows
    HAS_FLOCK = False
else:
    HAS_FLOCK = True

PATIENCE = 10.0  # seconds: a killed process keeps its lock until the system has taken its memory apart
_POLL = 0.1
_OURS = re.compile(rb"(pid [0-9]+ on .*)?\s*")  # content of a lock file
_HELD_BY_OTHERS = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES)

_log = logging.getLogger(__name__)


class RunLock:
    """An advisory lock (`flock`) on a file that is made for it and removed with it.

    The lock belongs to the process that took it: forked children, such as data loader workers, close their copy at
    once, or one that survives a killed run would keep the next one out. So this is not filelock, whose older versions
    free the lock of the parent in a child.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self, seconds: float = 0.0) -> str | None:
        """Take the lock, waiting at most this long for another process to end; nothing to do if it is held.

        Returns:
            None, or why there can be no lock here.

        Raises:
            HistoryError: another run holds it.
        """
        if self.is_held():
            return None
        self._close()
        if not HAS_FLOCK:
            return "this system has no flock"
        deadline, has_said = time.monotonic() + seconds, False
        while True:
            try:
                holder = self._try()
            except OSError as error:
                return str(error)
            if holder is None:
                return None
            if time.monotonic() >= deadline:
                raise HistoryError(
                    f"{self.path.parent} is in use by another run ({holder}). Give each run its own output_dir, or end "
                    f"the other one. If there is none, remove {self.path}."
                )
            if not has_said:
                _log.warning("%s is in use (%s): waiting up to %g s for it", self.path.parent, holder, seconds)
                has_said = True
            time.sleep(_POLL)

    def is_held(self) -> bool:
        """Whether this process holds the lock, and the file it is on is still the one at the path."""
        if self._descriptor is None:
            return False
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.lstat(self.path))
        except OSError:
            return False

    def release(self) -> None:
        """Remove the file and free the lock, if it is held."""
        if self.is_held():
            with contextlib.suppress(OSError):
                self.path.unlink()
        self._close()

    def __del__(self) -> None:
        if os.path is not None:  # as it is when Python ends
            self.release()

    def _try(self) -> str | None:
        """Take the lock: None if that worked, else who holds it. OSError if there can be no lock."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(self.path, flags, 0o644)
        try:
            flock(descriptor, LOCK_EX | LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 200)
            os.close(descriptor)
            if error.errno not in _HELD_BY_OTHERS:
                raise
            return printable(holder.decode(errors="replace").strip()) or "process unknown"
        self._descriptor = descriptor
        _LOCKS.add(self)
        if not self.is_held():  # removed by its last holder meanwhile: that was the lock of no path
            self._close()
            return "just released"
        if os.fstat(descriptor).st_nlink > 1 or not _OURS.fullmatch(os.pread(descriptor, 1000, 0)):
            self._close()
            raise FileExistsError(f"{self.path} is a file of somebody else")
        with contextlib.suppress(OSError):  # who holds it is only for the message
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        return None

    def _close(self) -> None:
        # Closed, not unlocked: unlocking would act on every copy of the descriptor.
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_LOCKS: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    for lock in list(_LOCKS):
        lock._close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
