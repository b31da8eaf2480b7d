# SPDX-License-Identifier: Apache-2.0
"""How much memory is free, what an evaluation took of it, and what to do when it runs out."""

from __future__ import annotations

import resource
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

_SHORTAGES = ("can't allocate memory", "out of memory", "cannot allocate memory", "not enough memory")


def find_device(model: nn.Module) -> torch.device:
    """Where a model is. Ranks: pure."""
    return next((p.device for p in model.parameters() if p.is_floating_point()), torch.device("cpu"))


def free_on_device(device: torch.device) -> int:
    """Bytes of an accelerator that torch can still hand out: the driver's, and those it holds and does not use."""
    module = getattr(torch, device.type)
    if not hasattr(module, "mem_get_info"):  # shares the machine's memory, or does not tell
        return free_on_host()
    free, _ = module.mem_get_info(device)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def free_on_host() -> int:
    """Bytes of host memory that can still be used on this machine, or in the container this process is in."""
    return min([int(psutil.virtual_memory().available), *_left_in_groups()])


def find_machine() -> str:
    """The same for all processes that share this machine's memory, containers on it included."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


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
                    counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    left.append(int(most) - int((folder / used).read_text()) + int(counts.get(files, 0)))
    return [max(0, each) for each in left]


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out, on a device or the host. Ranks: pure."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SHORTAGES)


def free_memory(error: Exception, device: torch.device) -> None:
    """Free what the frames of a failure still hold, and what the allocator keeps cached."""
    seen: Any = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


class PeakMemory:
    """The most memory used since construction beyond what was used then: of a GPU, else of this process.

    Sampled where :meth:`sample` is called; exact where use goes above the process's own high-water mark, which is only
    read, as resetting it would spoil the user's own measurement.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self._before = self._highest = self._read()
        self._mark_before = self._read_mark()

    def sample(self) -> int:
        """Take a sample, and return the most bytes so far."""
        mark = self._read_mark()
        self._highest = max(self._highest, self._read(), mark if mark > self._mark_before else 0)
        return self._highest - self._before

    def _read(self) -> int:
        if self._device.type == "cpu":
            return int(self._process.memory_info().rss)
        module = getattr(torch, self._device.type)
        return int(module.memory_allocated(self._device)) if hasattr(module, "memory_allocated") else 0

    def _read_mark(self) -> int:
        """The highest use since the process began, or since somebody reset that."""
        if self._device.type == "cpu":
            status = Path("/proc/self/status")
            if status.exists():  # getrusage would count what the process that started this one held
                lines = status.read_text().splitlines()
                return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        module = getattr(torch, self._device.type)
        return int(module.max_memory_allocated(self._device)) if hasattr(module, "max_memory_allocated") else 0
