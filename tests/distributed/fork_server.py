# SPDX-License-Identifier: Apache-2.0
"""Fork processes that have imported everything slow already: `fork_server MODULE...` imports these and waits for jobs.

Most of a short run is imports: about 7 s of CPU a rank. One job a line of stdin, one list of exit codes a line of
stdout. A job's processes run a module as `python -m` does; several are ranks with torchrun's variables.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import runpy
import socket
import sys
import time
from multiprocessing.connection import wait
from typing import Any

CONTEXT = multiprocessing.get_context("fork")


def run_rank(command: list[str], output: str, variables: dict[str, str]) -> None:
    """One process of a job, in a fork."""
    os.environ.update(variables)
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


def run_job(command: list[str], processes: int | None, output: str, timeout: float) -> list[int | None]:
    """Exit codes of all processes, None for one that was not done in time; the first to fail ends the others."""
    with socket.socket() as reserved:  # bound while the job runs, so that no other program is given the port
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        port = reserved.getsockname()[1]
        common = {
            "WORLD_SIZE": processes,
            "LOCAL_WORLD_SIZE": processes,
            "GROUP_RANK": 0,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": port,  # by which Lightning knows that the other ranks are there
            "TORCHELASTIC_RESTART_COUNT": 0,
        }
        variables = [{"RANK": rank, "LOCAL_RANK": rank, **common} for rank in range(processes)] if processes else [{}]
        ranks = [
            CONTEXT.Process(target=run_rank, args=(command, output, {name: str(value) for name, value in each.items()}))
            for each in variables
        ]
        for rank in ranks:
            rank.start()
        end = time.monotonic() + timeout
        running = ranks
        while running and time.monotonic() < end:
            wait([rank.sentinel for rank in running], timeout=end - time.monotonic())
            running = [rank for rank in running if rank.exitcode is None]
            if any(rank.exitcode for rank in ranks):
                end = min(end, time.monotonic() + 10)  # the others may still say what they make of it
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
            rank.join()
    return codes


def main(modules: list[str]) -> None:
    """Import, then serve until stdin is closed."""
    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin:
        job: dict[str, Any] = json.loads(line)
        print(json.dumps(run_job(**job)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
