# SPDX-License-Identifier: Apache-2.0
"""Report which rank is stuck, in which phase and where, when an evaluation hangs.

A thread watches the clock, and asks whether another rank has failed. It uses neither collectives nor an accelerator,
since either may be what hangs.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import NamedTuple

# Exit code of a process that ends with abort_on_hang; Python, torchrun and signals use others.
EXIT_CODE = 86
_GRACE_SECONDS = 5.0  # between report and exit, so that the other ranks can report too
_JOIN_SECONDS = 5.0
_ASK_SECONDS = 2.0  # between questions whether another rank has failed
_FORWARDS = 2.0  # a phase that can still end after another rank's failure does within as many of the longest before


class _Phase(NamedTuple):
    """A phase of this process. One tuple, so that a thread reads it whole."""

    name: str = ""
    start: float = 0.0  # perf_counter
    clock: float = 0.0  # seconds since 1970
    find_failure: Callable[[], str | None] | None = None


_phase = _Phase()
_longest = 0.0  # seconds of the longest phase so far that waited for other ranks and ended


def enter_phase(name: str, find_failure: Callable[[], str | None] | None = None) -> None:
    """Set the current phase of this rank, for the watchdog's report. Cheap; no effect without a watchdog.

    ``find_failure`` is for a phase that waits for other ranks and may never end if one has failed: it returns the
    failure in words, or None, and is called from the watchdog's thread if the phase takes seconds.
    """
    global _phase, _longest
    if _phase.find_failure is not None:
        _longest = max(_longest, time.perf_counter() - _phase.start)
    _phase = _Phase(name, time.perf_counter(), time.time(), find_failure)


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
        """The thread: report a phase after its time, twice its time, four times, ..., and at once if it can't end."""
        seen, patience = _phase, self._seconds
        failure, failed_at, is_reported = None, 0.0, False
        while not self.done.wait(min(max(0.0, seen.start + patience - time.perf_counter()), _ASK_SECONDS)):
            if _phase is not seen:
                seen, patience = _phase, self._seconds
                failure, is_reported = None, False
                continue
            now = time.perf_counter()
            is_due = now - seen.start >= patience
            if seen.find_failure is not None and now - seen.start >= _ASK_SECONDS and not is_reported:
                if failure is None:
                    failure, failed_at = seen.find_failure(), now
                elif now - failed_at >= max(_ASK_SECONDS, _FORWARDS * _longest):
                    is_due = is_reported = True
            if not is_due or _phase is not seen:
                continue
            _write(self._report(seen, failure if is_reported else None))
            patience *= 2
            if self._abort and not self.done.wait(min(_GRACE_SECONDS, self._seconds)) and _phase is seen:
                _write(f"[mir] rank {self._rank}: exiting with code {EXIT_CODE} (abort_on_hang)\n")
                os._exit(EXIT_CODE)  # the main thread may never return

    def _report(self, phase: _Phase, failure: str | None) -> str:
        frame = sys._current_frames().get(self._thread)
        seconds = f"{time.perf_counter() - phase.start:.0f} s"
        stack = "".join(traceback.format_stack(frame)) if frame else "  (the thread is gone)\n"
        state, advice = "STUCK?", "Every stuck rank reports; look first at ranks whose phase differs from that of most."
        if failure is not None:
            state = "STUCK:"
            advice = (
                f"{failure}. Ranks that wait for it inside the model's forward can't be called out of there, so "
                "training can't go on: end the job. abort_on_hang=True (--mir_abort_on_hang) does that."
            )
        return (
            f"[mir] rank {self._rank}: {state} {self._work}: {phase.name}, for {seconds} now, since "
            f"{datetime.fromtimestamp(phase.clock):%Y-%m-%d %H:%M:%S} (process {os.getpid()}). {advice} "
            f"Stack of this rank:\n{stack}"
        )


def _write(text: str) -> None:
    with suppress(OSError, ValueError):  # stderr is closed or full, and there is nowhere else to report
        sys.stderr.write(text)
        sys.stderr.flush()
