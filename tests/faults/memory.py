# SPDX-License-Identifier: Apache-2.0
"""Real shortage of memory in a chosen function: the process may not grow while the function runs."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

# With these every allocation of a page or more asks the system, and so meets the limit.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "4096", "MALLOC_TOP_PAD_": "0", "MALLOC_ARENA_MAX": "1"}


@contextmanager
def memory_ends_in(function: str, call: int = 1) -> Iterator[None]:
    """Inside the block: while ``function`` runs for the ``call``-th time, allocations fail as on a full machine."""
    calls = 0
    inside: FrameType | None = None
    before = resource.getrlimit(resource.RLIMIT_AS)

    def watch(frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal calls, inside
        if inside is None and event == "call" and frame.f_code.co_name == function:
            calls += 1
            if calls == call:
                inside = frame
                resource.setrlimit(resource.RLIMIT_AS, (_size(), before[1]))
        elif frame is inside and event == "return":
            resource.setrlimit(resource.RLIMIT_AS, before)

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(None)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _size() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
