# SPDX-License-Identifier: Apache-2.0
"""How much memory a block of work takes at most, beyond what was held before it."""

from __future__ import annotations

import math
import resource
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from mir_callback.errors import ConfigError

Place = Literal["device", "host"]

GB = 10**9
# Of what is free: the forwards and the solves need room too.
_SHARE = 0.5
_SHORTAGES = ("can't allocate memory", "out of memory", "cannot allocate memory", "not enough memory")


@dataclass(frozen=True)
class Budgets:
    """Bytes that this rank's rows may take.

    Attributes:
        device: where the model is.
        host: in host memory besides; 0 where that is the device itself.
        given: whether the user named the device's; if so not even one layer may go beyond it.
    """

    device: float
    host: float
    given: bool


@dataclass(frozen=True)
class Plan:
    """What one pass over the probe keeps.

    Attributes:
        place: where rows lie between the forwards and the maths.
        count: layers kept, at most as many as are left; 0 if not even one fits.
        at_once: layers on the device at a time for the maths.
    """

    place: Place
    count: int
    at_once: int


def plan_pass(layers: int, need: float, host_need: float, budgets: Budgets, *, spare: int = 0, world: int = 1) -> Plan:
    """Where to keep rows, and of how many of the layers that are left.

    All on the device if they fit there; else in host memory; else as many as fit, evenly over several passes.

    Args:
        layers: layers left, at least 1.
        need: bytes of one layer's rows on the device.
        host_need: bytes of one layer's rows in host memory.
        budgets: of this rank.
        spare: layers for which room on the device is needed besides while rows are joined.
        world: number of ranks; they solve one layer each side by side, so multiples of it are preferred.

    Ranks: pure; plans of ranks differ, and the smallest counts.
    """
    least = 0 if budgets.given else 1
    fitting = max(_how_many(budgets.device, need, layers + spare) - spare, least)
    if fitting >= layers:
        return Plan("device", layers, layers)
    at_once = max(_how_many(budgets.device, need, layers), least)  # rows from the host are joined on arrival
    on_host = _how_many(budgets.host, host_need, layers) if at_once else 0
    place: Place = "host" if on_host > fitting else "device"
    kept = max(on_host, fitting)
    if kept == 0:
        return Plan("device", 0, 0)
    passes = -(-layers // kept)
    count = -(-layers // passes)
    if place == "device":
        return Plan(place, count, count)
    at_once = min(at_once, count)
    return Plan(place, count, at_once - at_once % world if at_once > world else at_once)


def _how_many(budget: float, need: float, most: int) -> int:
    return most if need * most <= budget else int(budget // need)


def rows_bytes(count: int, dim: int, dtype: torch.dtype) -> int:
    """Bytes of ``count`` rows of ``dim`` numbers. Ranks: pure."""
    return count * dim * torch.empty((), dtype=dtype).element_size()


def pinned_bytes(size: int) -> int:
    """What torch takes for ``size`` bytes of pinned host memory: the next power of two. Ranks: pure."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


def check_capture_budget(capture_budget_gb: float | None) -> None:
    """Raise ConfigError unless it is None or a positive number. Ranks: pure."""
    if capture_budget_gb is None:
        return
    number = isinstance(capture_budget_gb, (int, float)) and not isinstance(capture_budget_gb, bool)
    if not number or not math.isfinite(capture_budget_gb) or capture_budget_gb <= 0:
        raise ConfigError(
            f"capture_budget_gb must be a number above 0 (GB of rows a rank may keep on its device), got "
            f"{capture_budget_gb!r}; leave it out for a share of what is free"
        )


def too_small(capture_budget_gb: float, need: float) -> ConfigError:
    """The error for a budget that not even one layer fits into; ``need`` in bytes."""
    return ConfigError(
        f"capture_budget_gb must hold the rows of one decoder layer, {need / GB:.3g} GB on the rank with the most, "
        f"got {capture_budget_gb:g}; allow at least {_rounded_up(need / GB)}, or use fewer samples or more ranks"
    )


def _rounded_up(number: float) -> str:
    """Two digits of a number, never below it."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return f"{math.ceil(number / unit * (1 - 1e-12)) * unit:.2g}"


def budgets_of(device: torch.device, capture_budget_gb: float | None, ranks_here: int, pinned: int = 0) -> Budgets:
    """What this rank may use.

    Args:
        device: where the model is.
        capture_budget_gb: the user's limit for it, or None for half of what is free.
        ranks_here: ranks on this machine, who share its memory.
        pinned: bytes of host memory that torch still keeps for this rank from an earlier evaluation.
    """
    host = _SHARE * host_available() / ranks_here
    given = capture_budget_gb is not None
    limit = capture_budget_gb * GB if capture_budget_gb is not None else None
    if device.type == "cpu":
        return Budgets(host if limit is None else limit, 0, given)
    free = _SHARE * device_available(device) if limit is None else limit
    return Budgets(free, host + pinned, given)


def device_available(device: torch.device) -> int:
    """Bytes of an accelerator that torch can still hand out: the driver's, and those it holds and does not use."""
    module = getattr(torch, device.type)
    if not hasattr(module, "mem_get_info"):  # shares the machine's memory, or does not tell
        return host_available()
    free, _ = module.mem_get_info(device)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def this_machine() -> str:
    """The same for all processes that share this machine's memory, containers on it included."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


def host_available() -> int:
    """Bytes of host memory that can still be used on this machine, or in the container this process is in."""
    available: int = psutil.virtual_memory().available
    return min([available, *_left_in_groups()])


def _left_in_groups(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes that the control groups this process is in leave; of both versions, unlimited ones left out."""
    if not membership.exists():
        return []
    left = []
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, used, files = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            files = "total_inactive_file"
        else:
            continue
        # In a container the group's own folder may be shown as the root, so parents are looked at too.
        for folder in (base / path.lstrip("/"), *(base / path.lstrip("/")).parents):
            if folder.is_relative_to(base) and (folder / limit).exists():
                most = (folder / limit).read_text().strip()
                if most != "max":
                    left.append(int(most) - int((folder / used).read_text()) + _counted(folder / "memory.stat", files))
    return [max(0, each) for each in left]


def _counted(path: Path, name: str) -> int:
    """One number of a file of lines `name number`; 0 if it is not there."""
    lines = (line.split() for line in path.read_text().splitlines())
    return next((int(value) for key, value in lines if key == name), 0)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out, on a device or the host. Ranks: pure."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SHORTAGES)


def let_go(error: Exception, device: torch.device) -> None:
    """Free what the frames of a failure still hold, and what the allocator keeps cached."""
    seen: Any = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


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
