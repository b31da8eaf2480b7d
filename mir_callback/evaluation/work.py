# SPDX-License-Identifier: Apache-2.0
"""Who does the heavy local work of an evaluation: the caller at once, or a side thread beside training.

An evaluation is a generator. It does its communication itself, on the thread that drives it, and yields local work: a
callable without collectives, whose result it wants back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

from mir_callback import distributed as collectives

T = TypeVar("T")

Work = Callable[[], Any]
Steps = Generator[Work, Any, T]


def run_now(steps: Steps[T]) -> T:
    """Drive an evaluation to its end; work that fails on one rank fails on all. Ranks: collective."""
    result = None
    while True:
        try:
            work = steps.send(result)
        except StopIteration as done:
            value: T = done.value
            return value
        with collectives.all_or_none():
            result = work()


class Background(Generic[T]):
    """Drives an evaluation while its caller does something else, most of the time.

    What it does before its first work runs at construction; each work runs on a side thread, and what follows on it
    when :meth:`advance` is called. At most one work is under way at a time.

    Args:
        steps: the evaluation.

    Ranks: collective, construction and all methods; every rank must call them at the same points of the program.
    """

    def __init__(self, steps: Steps[T]) -> None:
        self._steps = steps
        self._thread: threading.Thread | None = None
        self._result: Any = None
        self._error: Exception | None = None
        self._value: T | None = None
        self._resume(None)

    @property
    def finished(self) -> bool:
        """Whether :attr:`value` is there. The same on every rank."""
        return self._thread is None

    @property
    def value(self) -> T:
        """What the evaluation returned, once finished."""
        assert self.finished
        return self._value  # type: ignore[return-value]  # None only before the end

    def advance(self, *, wait: bool = False) -> bool:
        """Go on with the evaluation if every rank's work is done.

        Args:
            wait: for the work of all ranks, and until the evaluation is finished.

        Returns:
            Whether it is finished.

        Raises:
            Exception: as `collectives.agree`; the evaluation is over then.
        """
        while self._thread is not None:
            if not wait and not all(collectives.gather_objects(not self._thread.is_alive())):
                break
            self._thread.join()
            self._thread = None
            try:
                collectives.agree(self._error)
            except Exception:
                self._steps.close()
                raise
            self._resume(self._result)
            if not wait:
                break
        return self.finished

    def _resume(self, result: Any) -> None:
        try:
            work = self._steps.send(result)
        except StopIteration as done:
            self._value = done.value
            return
        self._result = None
        self._thread = threading.Thread(target=self._do, args=(work, _side_stream()), name="mir", daemon=True)
        self._thread.start()

    def _do(self, work: Work, stream: torch.cuda.Stream | None) -> None:
        try:
            with torch.no_grad(), _on(stream):
                self._result = work()
        except Exception as error:
            self._error = error


def _side_stream() -> torch.cuda.Stream | None:
    """A stream of this thread's GPU that begins where its current one is now; None without a GPU in use."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return stream


@contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work on a stream, and leave when it is done: its results may then be used on any other."""
    if stream is None:
        yield
        return
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield
        stream.synchronize()
