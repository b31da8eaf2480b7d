# SPDX-License-Identifier: Apache-2.0
"""Say which rank is stuck, in which phase and where, when an evaluation does not get on.

A side thread looks at the clock; it talks to no other rank and to no accelerator, either of which may be what hangs.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime

# Of a process that ends itself with abort_on_hang; Python, torchrun and signals use others.
EXIT_CODE = 86
_GRACE_SECONDS = 5.0  # between report and end, in which the other ranks report too
_JOIN_SECONDS = 5.0
# What this process does now and since when: name, perf_counter, time. Assigned as a whole, so a thread reads it whole.
_phase: tuple[str, float, float] = ("", 0.0, 0.0)


def enter_phase(name: str) -> None:
    """Note what this rank begins to do, for the watchdog's report. Cheap, and of no effect where nothing watches."""
    global _phase
    _phase = name, time.perf_counter(), time.time()


@contextmanager
def watchdog(work: str, rank: int, seconds: float | None, *, abort: bool = False) -> Iterator[None]:
    """Watch the calling thread inside the block: report a phase that lasts too long, with where the thread is.

    A phase of ``work`` that lasts longer than ``seconds`` is reported, and again after twice, four times, .. as long;
    None: never. ``abort`` ends the process with EXIT_CODE after the first report. Ranks: each for itself.
    """
    enter_phase("beginning")
    if seconds is None:
        yield
        return
    watch = _Watch(work, rank, seconds, abort)
    thread = threading.Thread(target=watch.run, name="mir-watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        watch.done.set()
        thread.join(_JOIN_SECONDS)  # at once, unless stderr blocks the thread: then it must not block training


class _Watch:
    """One block of work under watch."""

    def __init__(self, work: str, rank: int, seconds: float, abort: bool) -> None:
        self.done = threading.Event()
        self._work, self._rank, self._seconds, self._abort = work, rank, seconds, abort
        self._thread = threading.get_ident()

    def run(self) -> None:
        """The thread: report the phase when its time is over, twice its time, four times, .."""
        seen, patience = _phase, self._seconds
        while not self.done.wait(min(max(0.0, seen[1] + patience - time.perf_counter()), threading.TIMEOUT_MAX)):
            if _phase is not seen:
                seen, patience = _phase, self._seconds
                continue
            _write(self._report(*seen))
            patience *= 2
            if self._abort and not self.done.wait(min(_GRACE_SECONDS, self._seconds)) and _phase is seen:
                _write(f"[mir] rank {self._rank}: ends itself with exit code {EXIT_CODE} (abort_on_hang)\n")
                os._exit(EXIT_CODE)  # the main thread may never come back to unwind

    def _report(self, phase: str, since: float, clock: float) -> str:
        frame = sys._current_frames().get(self._thread)
        seconds = f"{time.perf_counter() - since:.0f} s"
        stack = "".join(traceback.format_stack(frame)) if frame else "  (the thread is gone)\n"
        return (
            f"[mir] rank {self._rank}: STUCK? {self._work}: {phase}, for {seconds} now, since "
            f"{datetime.fromtimestamp(clock):%Y-%m-%d %H:%M:%S} (process {os.getpid()}). Every rank that is stuck "
            f"reports; start with ranks whose phase differs from that of most. The rank is at:\n{stack}"
        )


def _write(text: str) -> None:
    with suppress(OSError, ValueError):  # a closed or full stderr: there is nowhere to say it
        sys.stderr.write(text)
        sys.stderr.flush()
