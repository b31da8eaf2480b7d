# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks share: alternating runs, the machine they ran on, and tables that say how they were made."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def options_of(description: str, **arguments: dict[str, Any]) -> argparse.Namespace:
    """Command-line options; ``--output`` is one of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, settings in arguments.items():
        parser.add_argument("--" + name.replace("_", "-"), **settings)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    return parser.parse_args()


def synchronised_seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Wall seconds and result of one call, all work on the device included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def alternate(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of calls made one after the other, again and again, after one round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            print(f"run {repeat} of {repeats}: {name}", file=sys.stderr)
            spent, _ = synchronised_seconds(call)
            if repeat:
                taken[name].append(spent)
    return taken


def ratio(taken: dict[str, list[float]], above: str, below: str) -> float:
    """Median of the ratios within each round, in which the machine was the same for both."""
    return statistics.median(a / b for a, b in zip(taken[above], taken[below], strict=True))


def machine(*packages: str) -> str:
    """Processor or GPU, cores, threads, and versions."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", *packages))
    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    else:
        where = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads a process"
    return f"{where}; Python {platform.python_version()}, {versions}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def publish(output: Path | None, *blocks: Sequence[str] | str) -> None:
    """Print blocks of lines, and write them below the command that made them where asked."""
    text = "\n\n".join(block if isinstance(block, str) else "\n".join(block) for block in blocks)
    print(text)
    if output:
        command = shlex.join(["python", *sys.argv])
        output.write_text(f"`{command}`\n\n{text}\n", encoding="utf-8")


def _processor() -> str:
    """The processor's name as the system tells it."""
    told = Path("/proc/cpuinfo")
    for line in told.read_text(encoding="utf-8").splitlines() if told.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
