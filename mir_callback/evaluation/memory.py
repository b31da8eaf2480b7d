# SPDX-License-Identifier: Apache-2.0
"""Free memory, peak memory of an evaluation, and recovery from running out of it."""

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

from mir_callback.model.sharding import fsdp_states

_SHORTAGES = ("can't allocate memory", "out of memory", "cannot allocate memory", "not enough memory")


def find_device(model: nn.Module) -> torch.device:
    """The device that a model computes on; FSDP2 may keep its shards in host memory meanwhile. Ranks: pure."""
    for state in fsdp_states(model):
        return torch.device(state._device)
    return next((p.device for p in model.parameters() if p.is_floating_point()), torch.device("cpu"))


def free_on_device(device: torch.device) -> int:
    """Bytes that torch can still allocate on an accelerator: free in the driver, or cached by torch and unused."""
    module = getattr(torch, device.type)
    if not hasattr(module, "mem_get_info"):  # shares the machine's memory, or does not say
        return free_on_host()
    free, _ = module.mem_get_info(device)
    return int(free + module.memory_reserved(device) - module.memory_allocated(device))


def free_on_host() -> int:
    """Bytes of host memory that are available on this machine, or in this process's container."""
    return min([int(psutil.virtual_memory().available), *_available_in_cgroups()])


def find_machine() -> str:
    """An identifier of the machine whose memory this process uses, the same in all containers on it."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


def _available_in_cgroups(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[int]:
    """Available bytes in each cgroup (v1 or v2) of this process that has a limit."""
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
        # In a container the cgroup's own folder may be mounted as the root, so parents are searched too.
        for folder in (base / path.lstrip("/"), *(base / path.lstrip("/")).parents):
            if folder.is_relative_to(base) and (folder / limit).exists():
                most = (folder / limit).read_text().strip()
                if most != "max":
                    counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    left.append(int(most) - int((folder / used).read_text()) + int(counts.get(files, 0)))
    return [max(0, each) for each in left]


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error means out of memory, on a device or the host. Ranks: pure."""
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SHORTAGES)


def free_memory(error: Exception, device: torch.device) -> None:
    """Free what the frames of an error's traceback refer to, and the allocator's cache."""
    seen: Any = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


class PeakMemory:
    """Peak memory since construction beyond what was used then: of a GPU, else of this process.

    Sampled where :meth:`sample` is called, and exact if it exceeds the process's high-water mark. That is only read,
    because resetting it would spoil the user's own measurements.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self._before = self._highest = self._read()
        self._mark_before = self._read_mark()

    def sample(self) -> int:
        """Take a sample, and return the peak so far in bytes."""
        mark = self._read_mark()
        self._highest = max(self._highest, self._read(), mark if mark > self._mark_before else 0)
        return self._highest - self._before

    def _read(self) -> int:
        if self._device.type == "cpu":
            return int(self._process.memory_info().rss)
        module = getattr(torch, self._device.type)
        return int(module.memory_allocated(self._device)) if hasattr(module, "memory_allocated") else 0

    def _read_mark(self) -> int:
        """The high-water mark of the process in bytes."""
        if self._device.type == "cpu":
            status = Path("/proc/self/status")
            if status.exists():  # getrusage would include memory of the parent process
                lines = status.read_text().splitlines()
                return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        module = getattr(torch, self._device.type)
        return int(module.max_memory_allocated(self._device)) if hasattr(module, "max_memory_allocated") else 0
