# SPDX-License-Identifier: Apache-2.0
"""One rank of a group in which rank 1 runs out of memory in one part of an evaluation after another."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from typing import Any

import torch.distributed as dist

from mir_callback import Probe
from mir_callback.config import MIRConfig
from mir_callback.evaluation.evaluate import Evaluator
from mir_callback.probe.adapters import HuggingFaceAdapter
from tests import tiny_models
from tests.distributed.launch import write_rank
from tests.faults.memory import memory_ends_in
from tests.samples import pairs

# Function that runs out of memory, at which of its calls, and in which of the two probes. All are local work: what runs
# out inside a collective itself cannot be healed.
CASES: dict[str, tuple[str, int, str]] = {
    "norms": ("compute_row_norms", 3, "many rows"),
    "gathering norms": ("_room_for", 1, "many rows"),
    "first round of the medians": ("_count_at_most", 1, "many rows"),
    "later round of the medians": ("_count_at_most", 40, "many rows"),
    "every round of the medians": ("bisect_lower_medians", 1, "many rows"),
    "sums": ("sum_rows", 1, "many rows"),
    "scatter of text": ("compute_scatter", 2, "many rows"),
    "centred rows": ("_centred_or_scatter", 1, "few rows"),
    "gathering centred rows": ("_room_for", 4, "few rows"),
    "moments from centred rows": ("moments_from_centred", 1, "few rows"),
    "factors": ("moments_from_scatter", 1, "many rows"),
    "solve": ("compute_covariance_part", 1, "many rows"),
    "transport maps": ("compute_transport_maps", 1, "many rows"),
}

# What is made good: a forward by smaller batches, a layer that cannot be kept by another pass.
HEALED: dict[str, tuple[str, int, str]] = {
    "forward": ("forward", 1, "many rows"),
    "keeping rows of the first layer": ("_add", 1, "many rows"),
    "keeping rows of the last layer": ("_add", 3, "many rows"),
}


def main(folder: str) -> None:
    """Run every case; after each the ranks must still be in step."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, processor = tiny_models.llava(hidden=256)
    adapter = HuggingFaceAdapter(model, processor)
    probes = {"many rows": Probe.from_pairs(pairs(40)), "few rows": Probe.from_pairs(pairs(6))}

    def evaluator(name: str) -> Evaluator:
        return Evaluator(model, probes[name], adapter, MIRConfig(batch_size=10))

    evaluators = {name: evaluator(name) for name in probes}

    def value(name: str) -> float:
        return evaluators[name].evaluate(model, progress=False).mir

    def healed(function: str, call: int, name: str) -> dict[str, Any]:
        fresh = evaluator(name)  # its batches may be cut anew
        fresh.evaluate(model, progress=False)  # samples have been compared in a batch and alone
        with memory_ends_in(function, call) if rank == 1 else nullcontext():
            report = fresh.evaluate(model, progress=False)
        return {"value": report.mir, "batch_size": report.batch_size, "passes": report.passes}

    healthy = {name: value(name) for name in probes}
    found: dict[str, Any] = {}
    for case, (function, call, name) in CASES.items():
        print(f"rank {rank}: {case}", flush=True)
        shortage = memory_ends_in(function, call) if rank == 1 else nullcontext()
        started = time.perf_counter()
        try:
            with shortage:
                evaluators[name].evaluate(model, progress=False)
            error = "none"
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
        seconds = time.perf_counter() - started
        found[case] = {"error": error, "seconds": seconds, "value afterwards": value(name)}
    good = {case: healed(*where) for case, where in HEALED.items()}
    write_rank(folder, rank, {"healthy": healthy, "cases": found, "healed": good})
    dist.destroy_process_group()  # left open, it may abort the process at its exit


if __name__ == "__main__":
    main(*sys.argv[1:])
