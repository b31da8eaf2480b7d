# SPDX-License-Identifier: Apache-2.0
"""Start real torch.distributed processes and read what each rank wrote."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mir_callback.record import EvalRecord, as_records

ROOT = Path(__file__).parents[2]
# By every environment that has ranks, before they are forked.
IMPORTED = ("deepspeed", "transformers.trainer", "transformers.models.llava.modeling_llava")
# By ours too: Lightning, TRL, PEFT, Accelerate.
IMPORTED_HERE = ("tests.matrix.clients",)


def run_process(
    arguments: list[str],
    *,
    python: str | Path = sys.executable,
    environment: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """Run a Python command from the repository's root; its exit code is left to the caller to judge."""
    command = [str(python), *arguments]
    pipe = subprocess.PIPE
    surroundings = _surroundings(python, environment)
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
    processes: int | None = 2,
    python: str | Path = sys.executable,
    environment: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> list[Any]:
    """Run `python -m module folder arguments...` on several ranks, or as one plain process (``processes=None``).

    The processes are forks of one that has done its imports, or under torchrun where they need an ``environment`` of
    their own. Each rank writes `<folder>/rank<r>.json`, and what it prints is in `<folder>/output.txt`.

    Returns:
        What each rank wrote, in rank order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "output.txt"
    command = [module, str(folder), *arguments]
    if environment:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        words = [*(torchrun if processes else []), "-m", *command]
        finished = run_process(words, python=python, environment=environment, timeout=timeout)
        output.write_text(finished.stdout + finished.stderr)
        codes = [finished.returncode]
    else:
        job = {"command": command, "processes": processes, "output": str(output), "timeout": timeout}
        server = _fork_server(python)
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        codes = json.loads(server.stdout.readline())
    assert all(code == 0 for code in codes), (
        f"{command} ended with {codes} (None: not done after {timeout} s):\n{output.read_text()[-12000:]}"
    )
    return [read_rank(folder / f"rank{rank}.json") for rank in range(processes or 1)]


@functools.cache
def _fork_server(python: str | Path) -> Any:
    """The process that forks this session's ranks; it ends with its stdin, which is ours."""
    imported = (*IMPORTED, *IMPORTED_HERE) if python == sys.executable else IMPORTED
    command = [str(python), "-m", "tests.distributed.fork_server", *imported]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=_surroundings(python), cwd=ROOT, stdin=pipe, stdout=pipe, text=True)


def extensions_of(python: str | Path) -> dict[str, str]:
    """Where an environment of its own builds DeepSpeed's extension: beside another's, or each would replace it."""
    built = os.environ.get("TORCH_EXTENSIONS_DIR")
    return {"TORCH_EXTENSIONS_DIR": f"{built}/{Path(python).parents[1].name}"} if built else {}


def _surroundings(python: str | Path, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    return {
        **os.environ,
        **(extensions_of(python) if isinstance(python, Path) else {}),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        **(environment or {}),
    }


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
