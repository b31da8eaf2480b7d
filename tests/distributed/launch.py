# SPDX-License-Identifier: Apache-2.0
"""Start real torch.distributed processes and read what each rank wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mir_callback.record import EvalRecord, as_records

ROOT = Path(__file__).parents[2]


def run_process(
    arguments: list[str],
    *,
    python: str | Path = sys.executable,
    environment: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run a Python command from the repository's root; its exit code is left to the caller to judge."""
    surroundings = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        **(environment or {}),
    }
    command = [str(python), *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=surroundings, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as late:
            process.terminate()  # torchrun ends its ranks; killed at once, it would leave them running
            output, errors = process.communicate(timeout=60)
            raise AssertionError(
                f"{command} was not done after {timeout} s:\n{output[-4000:]}\n{errors[-8000:]}"
            ) from late
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def run_ranks(
    module: str,
    folder: Path,
    *arguments: str,
    processes: int = 2,
    python: str | Path = sys.executable,
    torchrun: bool = True,
    environment: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> list[Any]:
    """Run `python -m module folder arguments...` on several ranks, under torchrun or as one plain process.

    Each rank writes `<folder>/rank<r>.json`. A run is judged by these files and not by its exit code: two-rank runs
    on the CPU sometimes abort while the interpreter shuts down, also without anything of ours in them.

    Returns:
        What each rank wrote, in rank order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if torchrun else []
    command = [*launcher, "-m", module, str(folder), *arguments]
    finished = run_process(command, python=python, environment=environment, timeout=timeout)
    (folder / "output.txt").write_text(finished.stdout + finished.stderr)
    missing = [rank for rank in range(processes) if not (folder / f"rank{rank}.json").exists()]
    assert not missing, f"ranks {missing} wrote nothing:\n{finished.stdout[-4000:]}\n{finished.stderr[-8000:]}"
    return [read_rank(folder / f"rank{rank}.json") for rank in range(processes)]


def write_rank(folder: str | Path, rank: int, value: Any) -> None:
    """Write one rank's result; for the processes started."""
    beside = Path(folder) / f"rank{rank}.tmp"
    beside.write_text(json.dumps(value, default=EvalRecord.to_dict))
    beside.rename(Path(folder) / f"rank{rank}.json")


def read_rank(path: Path) -> Any:
    """What one rank wrote, a `history` in it as records again."""
    value = json.loads(path.read_text())
    if isinstance(value, dict) and isinstance(value.get("history"), list):
        value["history"] = as_records(value["history"])
    return value
