# SPDX-License-Identifier: Apache-2.0
"""How much memory a block of work takes at most, beyond what was held before it."""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

_SECONDS_BETWEEN_LOOKS = 0.005


class PeakMeter:
    """The highest memory use seen, and the one before. See :func:`peak_memory`.

    Torch's own peak could be read exactly by resetting it, but it belongs to the user, whose measurement of training
    would be lost. So it is read only: where the work goes above the process's peak so far, that is exact. Below it the
    use is sampled, by a thread and wherever :meth:`look` is called, and what lives for less than that may be missed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self._before = self._highest = self._now()
        self._record_before = self._record()
        self._open = True

    def look(self) -> None:
        """Take a sample now, unless the block is over."""
        if self._open:
            self._highest = max(self._highest, self._now())

    @property
    def extra_bytes(self) -> int:
        """Highest use so far beyond that at the start: of the device, or of this process if that is the CPU."""
        self.look()
        record = self._record() if self._open else 0
        if record > self._record_before:
            self._highest = max(self._highest, record)
        return self._highest - self._before

    def close(self) -> None:
        """The block is over; what comes after is no part of it."""
        _ = self.extra_bytes
        self._open = False

    def _now(self) -> int:
        if self._device.type == "cpu":
            return int(self._process.memory_info().rss)
        module = getattr(torch, self._device.type)
        return int(module.memory_allocated(self._device)) if hasattr(module, "memory_allocated") else 0

    def _record(self) -> int:
        """The process's highest use since it began, or since somebody reset that."""
        if self._device.type == "cpu":
            unit = 1 if sys.platform == "darwin" else 1024
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        module = getattr(torch, self._device.type)
        return int(module.max_memory_allocated(self._device)) if hasattr(module, "max_memory_allocated") else 0


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMeter]:
    """Watch memory use of a block from a side thread, which speaks with nobody. Ranks: each for itself."""
    meter = PeakMeter(device)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_SECONDS_BETWEEN_LOOKS):
            meter.look()

    thread = threading.Thread(target=watch, name="mir memory", daemon=True)
    thread.start()
    try:
        yield meter
    finally:
        done.set()
        thread.join()
        meter.close()
