# SPDX-License-Identifier: Apache-2.0
"""Report which rank is stuck, in which phase and where, when an evaluation hangs.

A thread watches the clock. It uses neither other ranks nor an accelerator, since either may be what hangs.
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

# Exit code of a process that ends with abort_on_hang; Python, torchrun and signals use others.
EXIT_CODE = 86
_GRACE_SECONDS = 5.0  # between report and exit, so that the other ranks can report too
_JOIN_SECONDS = 5.0
# Current phase of this process: name, perf_counter and time of its start. One tuple, so that a thread reads it whole.
_phase: tuple[str, float, float] = ("", 0.0, 0.0)


def enter_phase(name: str) -> None:
    """Set the current phase of this rank, for the watchdog's report. Cheap; no effect without a watchdog."""
    global _phase
    _phase = name, time.perf_counter(), time.time()


@contextmanager
def watchdog(work: str, rank: int, seconds: float | None, *, abort: bool = False) -> Iterator[None]:
    """Inside, report every phase of the calling thread that takes too long, with the thread's stack.

    Args:
        work: what is being done, for the report.
        rank: this process's rank, for the report.
        seconds: a phase is reported when it takes longer than this, and again after 2, 4, 8, ... times as long; None to
            never report.
        abort: end the process with EXIT_CODE after the first report.

    Ranks: any; no communication.
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
        thread.join(_JOIN_SECONDS)  # with a timeout: if stderr blocks the thread, training must not block too


class _Watch:
    """The watchdog of one block."""

    def __init__(self, work: str, rank: int, seconds: float, abort: bool) -> None:
        self.done = threading.Event()
        self._work, self._rank, self._seconds, self._abort = work, rank, seconds, abort
        self._thread = threading.get_ident()

    def run(self) -> None:
        """The thread: report a phase after its time, twice its time, four times, ..."""
        seen, patience = _phase, self._seconds
        while not self.done.wait(min(max(0.0, seen[1] + patience - time.perf_counter()), threading.TIMEOUT_MAX)):
            if _phase is not seen:
                seen, patience = _phase, self._seconds
                continue
            _write(self._report(*seen))
            patience *= 2
            if self._abort and not self.done.wait(min(_GRACE_SECONDS, self._seconds)) and _phase is seen:
                _write(f"[mir] rank {self._rank}: exiting with code {EXIT_CODE} (abort_on_hang)\n")
                os._exit(EXIT_CODE)  # the main thread may never return

    def _report(self, phase: str, since: float, clock: float) -> str:
        frame = sys._current_frames().get(self._thread)
        seconds = f"{time.perf_counter() - since:.0f} s"
        stack = "".join(traceback.format_stack(frame)) if frame else "  (the thread is gone)\n"
        return (
            f"[mir] rank {self._rank}: STUCK? {self._work}: {phase}, for {seconds} now, since "
            f"{datetime.fromtimestamp(clock):%Y-%m-%d %H:%M:%S} (process {os.getpid()}). Every stuck rank reports; "
            f"look first at ranks whose phase differs from that of most. Stack of this rank:\n{stack}"
        )


def _write(text: str) -> None:
    with suppress(OSError, ValueError):  # stderr is closed or full, and there is nowhere else to report
        sys.stderr.write(text)
        sys.stderr.flush()
