# SPDX-License-Identifier: Apache-2.0
"""An evaluation on 1, 2 and 4 processes of one machine, and on two torchrun nodes of one process each.

    python benchmarks/ranks.py
    python benchmarks/ranks.py --hidden 1024 --samples 16

Starts itself under torchrun (gloo, 127.0.0.1). Every process has as many threads as ``--threads`` says, so that more
processes are more processors until those of the machine are all at work; past that the seconds say nothing any more,
but each rank's CPU seconds still show how the work is shared.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import machine, options_of, publish, table
from random_llava import bare_forward, build, make_evaluator

OPTIONS: dict[str, dict[str, Any]] = {
    "hidden": {"type": int, "default": 512},
    "layers": {"type": int, "default": 4},
    "samples": {"type": int, "default": 4},
    "text": {"type": int, "default": 300, "help": "text tokens a sample"},
    "threads": {"type": int, "default": 1, "help": "of each process"},
    "repeats": {"type": int, "default": 2},
    "worker": {"type": Path, "help": argparse.SUPPRESS},
}
SETUPS = {"1 process": (1, 1), "2 processes": (1, 2), "4 processes": (1, 4), "2 nodes of 1 process": (2, 1)}


def work(options: argparse.Namespace) -> None:
    """One rank: alternate bare forwards and evaluations, and leave what they took in a file of its own."""
    dist.init_process_group("gloo")
    torch.set_num_threads(options.threads)
    model = build(options.hidden, options.layers, tower_layers=1)
    evaluator = make_evaluator(model, options.samples, options.text, batch_size=1)
    forward = bare_forward(model, evaluator)
    told: dict[str, list[float]] = {name: [] for name in ("forward", "evaluation", "forward_cpu", "evaluation_cpu")}
    value = 0.0
    for repeat in range(options.repeats + 1):
        for name in ("forward", "evaluation"):
            dist.barrier()
            started, cpu = time.perf_counter(), time.process_time()
            if name == "forward":
                forward()
            else:
                value = evaluator.evaluate(model, progress=False).mir
            cpu = time.process_time() - cpu
            dist.barrier()
            if repeat:
                told[name].append(time.perf_counter() - started)
                told[name + "_cpu"].append(cpu)
    medians = {name: statistics.median(values) for name, values in told.items()}
    options.worker.joinpath(f"{dist.get_rank()}.json").write_text(json.dumps({"mir": value, **medians}))
    dist.destroy_process_group()


def launch(nodes: int, processes: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """Run all ranks of a setup and return what each of them found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        own = [f"--{name}={getattr(options, name)}" for name in OPTIONS if name != "worker"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes)]
        command += ["--nproc_per_node", str(processes), "--master_addr", "127.0.0.1", "--master_port", str(port)]
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        running = [
            subprocess.Popen([*command, "--node_rank", str(node), __file__, "--worker", folder, *own], env=environment)
            for node in range(nodes)
        ]
        if any(node.wait() for node in running):
            raise SystemExit(f"{nodes} x {processes}: a rank failed, see above")
        return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]


def main() -> None:
    """Print the table, and write it where asked."""
    options = options_of(__doc__, **OPTIONS)
    if options.worker:
        work(options)
        return
    rows = []
    first = 0.0
    for name, (nodes, processes) in SETUPS.items():
        print(name, file=sys.stderr)
        ranks = launch(nodes, processes, options)
        first = first or ranks[0]["mir"]
        cells = [
            max(rank[what] for rank in ranks) for what in ("forward", "evaluation", "forward_cpu", "evaluation_cpu")
        ]
        spread = max(abs(rank["mir"] - first) for rank in ranks)
        rows.append([name, *(f"{cell:.2f}" for cell in cells), f"{cells[1] / cells[0]:.2f}", f"{spread:.0e}"])
    torch.set_num_threads(options.threads)
    publish(
        options.output,
        f"{machine('transformers')}; hidden {options.hidden}, {options.layers} layers, {options.samples} samples of "
        f"576 image and {options.text} text tokens, float32, random weights; medians of {options.repeats} alternating "
        "runs, of the slowest rank",
        table(
            [
                *("ranks", "bare forward (s)", "evaluation (s)", "forward, CPU s a rank", "evaluation, CPU s a rank"),
                *("evaluation / forward", "MIR differs from 1 process by"),
            ],
            rows,
        ),
    )


if __name__ == "__main__":
    main()
