# SPDX-License-Identifier: Apache-2.0
"""Say which rank is stuck, in which phase and where, when an evaluation does not get on.

A side thread looks at the clock; it talks to no other rank and to no accelerator, either of which may be what hangs.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime

from tqdm.auto import tqdm

from mir_callback.errors import ConfigError

_DELAY_SECONDS = 3.0

# Hears what this rank begins to do; called often, so it should be quick.
Tell = Callable[[str], None]


def nobody(_phase: str) -> None:
    """Hears, and says nothing."""


@contextmanager
def progress_bar(*, shown: bool) -> Iterator[tqdm]:
    """A bar that shows itself only if the evaluation takes longer than a few seconds."""
    with tqdm(total=0, desc="MIR", unit="step", delay=_DELAY_SECONDS, disable=not shown, leave=False) as bar:
        yield bar


DEFAULT_SECONDS = 600.0
# Of a process that ends itself with abort_on_hang; Python, torchrun and signals use others.
EXIT_CODE = 86
_GRACE_SECONDS = 5.0  # between report and end, in which the other ranks report too
_JOIN_SECONDS = 5.0


@dataclass(frozen=True)
class Watchdog:
    """Watches phases of work in the main thread.

    Attributes:
        seconds: a phase that lasts longer is reported; again after twice, four times, .. as long. None: never.
        abort: end the process with EXIT_CODE after the first report.

    Raises:
        ConfigError: a value breaks its rule.
    """

    seconds: float | None = DEFAULT_SECONDS
    abort: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        seconds = self.seconds
        if seconds is not None and (
            isinstance(seconds, bool)
            or not isinstance(seconds, (int, float))
            or not (math.isfinite(seconds) and seconds > 0)
        ):
            raise ConfigError(
                f"watchdog_seconds must be a positive number of seconds, or None for no watchdog, got {seconds!r}; "
                "use more than the longest phase of a healthy evaluation, e.g. 600"
            )
        if not isinstance(self.abort, bool):
            raise ConfigError(f"abort_on_hang must be True or False, got {self.abort!r}")
        if self.abort and seconds is None:
            raise ConfigError("abort_on_hang must come with watchdog_seconds, got None; use e.g. watchdog_seconds=600")

    @contextmanager
    def over(self, work: str, rank: int) -> Iterator[Tell]:
        """Watch the calling thread inside the block.

        Args:
            work: what the block does, such as "evaluation at step 50".
            rank: whose reports these are.

        Yields:
            What to call with the name of each phase as it begins.

        Ranks: each for itself.
        """
        if self.seconds is None:
            yield lambda _phase: None
            return
        watch = _Watch(work, rank, self.seconds, self.abort)
        thread = threading.Thread(target=watch.run, name="mir-watchdog", daemon=True)
        thread.start()
        try:
            yield watch.tell
        finally:
            watch.done.set()
            thread.join(_JOIN_SECONDS)  # at once, unless stderr blocks the thread: then it must not block training


class _Watch:
    """One block of work under watch."""

    def __init__(self, work: str, rank: int, seconds: float, abort: bool) -> None:
        self.done = threading.Event()
        self._work, self._rank, self._seconds, self._abort = work, rank, seconds, abort
        self._watched = threading.get_ident()
        self.tell("beginning")

    def tell(self, phase: str) -> None:
        """Note the phase that begins now; one assignment, which the thread reads whole."""
        self._phase = phase, time.perf_counter(), time.time()

    def run(self) -> None:
        """The thread: report the phase when its time is over, twice its time, four times, .."""
        seen, patience = self._phase, self._seconds
        while not self.done.wait(max(0.0, seen[1] + patience - time.perf_counter())):
            if self._phase is not seen:
                seen, patience = self._phase, self._seconds
                continue
            _write(self._report(*seen))
            patience *= 2
            if self._abort and not self.done.wait(min(_GRACE_SECONDS, self._seconds)) and self._phase is seen:
                _write(f"[mir] rank {self._rank}: ends itself with exit code {EXIT_CODE} (abort_on_hang)\n")
                os._exit(EXIT_CODE)  # the main thread may never come back to unwind

    def _report(self, phase: str, since: float, clock: float) -> str:
        frame = sys._current_frames().get(self._watched)
        seconds = f"{time.perf_counter() - since:.0f} s"
        stack = "".join(traceback.format_stack(frame)) if frame else "  (the thread is gone)\n"
        return (
            f"[mir] rank {self._rank}: STUCK? {self._work}: {phase}, for {seconds} now, since "
            f"{datetime.fromtimestamp(clock):%Y-%m-%d %H:%M:%S} (process {os.getpid()}). Every rank that is stuck "
            f"reports; look first at those in another phase than the most. The rank is at:\n{stack}"
        )


def _write(text: str) -> None:
    with suppress(OSError, ValueError):  # a closed or full stderr: there is nowhere to say it
        sys.stderr.write(text)
        sys.stderr.flush()
