# SPDX-License-Identifier: Apache-2.0
"""Runs in which something breaks: what was said, what is on the disk, how long until all had gone on or stopped."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mir_callback.history import read_history
from mir_callback.record import EvalRecord
from tests.distributed.launch import read_rank, run_process


@dataclass(frozen=True)
class Broken:
    """A run with a fault in it.

    Attributes:
        ranks: what each rank wrote at its end, None for one that did not get there.
        output: stdout and stderr of all ranks and of the launcher.
        seconds: from the fault to the end of all processes; from the start where no fault was noted.
        code: the launcher's exit code.
        folder: of the run.
    """

    ranks: list[dict[str, Any] | None]
    output: str
    seconds: float
    code: int
    folder: Path

    @property
    def steps(self) -> list[int]:
        """Steps in the history file."""
        return [record.step for record in self.records]

    @property
    def records(self) -> list[EvalRecord]:
        """The history file, which must be whole."""
        return read_history(self.folder / "run" / "mir_history.jsonl")


def run_broken(
    folder: Path,
    fault: str,
    setup: str = "ddp",
    *,
    processes: int = 2,
    environment: Mapping[str, str] | None = None,
    timeout: float = 120,
    **options: Any,
) -> Broken:
    """Train on several ranks with a fault of tests/faults/train_worker.py; ``options`` are MIRCallback's."""
    folder.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launcher, "-m", "tests.faults.train_worker", str(folder), fault, setup, json.dumps(options)]
    started = time.monotonic()
    finished = run_process(command, environment=environment, timeout=timeout)
    ended = time.monotonic()
    noted = folder / "fault.txt"
    output = finished.stdout + finished.stderr
    (folder / "output.txt").write_text(output)
    files = [folder / f"rank{rank}.json" for rank in range(processes)]
    ranks = [read_rank(file) if file.exists() else None for file in files]
    began = float(noted.read_text()) if noted.exists() else started
    return Broken(ranks, output, ended - began, finished.returncode, folder)


def reports(output: str) -> dict[int, str]:
    """What the watchdog said of each rank first, with the stack below it."""
    found: dict[int, str] = {}
    for match in re.finditer(r"\[mir\] rank (\d+): (STUCK[?:] .*?)(?=\[mir\]|\Z)", output, flags=re.DOTALL):
        found.setdefault(int(match[1]), match[2])
    return found
