# SPDX-License-Identifier: Apache-2.0
"""Clients x layouts, each without MIR and with it: 0 differing bits, whole log rows, right values, all in its shards.

As a script it prints the whole matrix: `python -m tests.matrix.test_matrix [LAYOUT...]`.
"""

import sys
import tempfile
from pathlib import Path

import pytest
import torch

from mir_callback import evaluate_mir
from tests.distributed.launch import run_ranks
from tests.matrix.clients import CLIENTS, PROBE, STEPS, STRATEGIES, WATCH, make_model

# Each is started once, for all clients in it.
LAYOUTS = ("one", "ddp", "zero2", "zero3", "fsdp2")
# Set-ups beside the five, by the clients that are run in them.
EXTRAS = {
    "fsdp1": ("huggingface", "accelerate", "plain"),
    "fsdp2 HSDP": ("plain", "lightning"),
    "fsdp2 CPU offload": ("plain", "lightning"),
    "fsdp2 bfloat16": ("plain", "lightning"),
    "fsdp2 LoRA": ("trl", "huggingface", "plain"),
}
# Pairs that do not exist, and why; `test_pairs_left_out_do_not_exist` sees that it is so.
LEFT_OUT = {
    ("lightning", "zero2"): "Lightning's DeepSpeedStrategy runs on CUDA only",
    ("lightning", "zero3"): "Lightning's DeepSpeedStrategy runs on CUDA only",
}
FAST = {("one", each) for each in CLIENTS}
SAME = ("rows", "weights", "optimizer", "random", "flags")


def clients_of(layout):
    return [each for each in EXTRAS.get(layout, CLIENTS) if (each, layout) not in LEFT_OUT]


def run_layout(layout, folder, clients):
    """What each rank found, by client."""
    processes = None if layout == "one" else 2
    return run_ranks("tests.matrix.worker", folder, layout, ",".join(clients), processes=processes, timeout=600)


def differing(plain, watched):
    """Names of the fields, and in them of the tensors, that differ."""
    found = []
    for field in SAME:
        a, b = plain[field], watched[field]
        if isinstance(a, dict) and a.keys() == b.keys():
            found += [f"{field} {name}" for name in a if a[name] != b[name]]
        elif a != b:
            found.append(field)
    return found


def error_of(layout, folder, client, history):
    """How far the last value is from that of one process with the same weights."""
    model, processor = make_model(layout)
    model.load_state_dict(torch.load(folder / client / "watched" / "weights.pt"), strict=False)
    return abs(evaluate_mir(model, PROBE, processor=processor, batch_size=WATCH["batch_size"]).mir - history[-1]["mir"])


def judge(layout, folder, client, ranks):
    """A row of the matrix."""
    return {
        "differing": sorted({each for rank in ranks for each in differing(rank["plain"], rank["watched"])}),
        "error": error_of(layout, folder, client, ranks[0]["watched"]["history"]),
        "left": max(max(rank["watched"]["left"]) for rank in ranks),
        "evaluations": [record["step"] for record in ranks[0]["watched"]["history"]],
        "rows": len(ranks[0]["plain"]["rows"]),
        "ours": ranks[0]["watched"]["ours"],
    }


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Run a layout once."""
    done = {}

    def run(layout):
        if layout not in done:
            folder = tmp_path_factory.mktemp(layout.replace(" ", "-"))
            done[layout] = folder, run_layout(layout, folder, clients_of(layout))
        return done[layout]

    return run


def main(chosen):
    """Print the matrix."""
    for layout in chosen or [*LAYOUTS, *EXTRAS]:
        with tempfile.TemporaryDirectory() as name:
            clients = clients_of(layout)
            ranks = run_layout(layout, Path(name), clients)
            for client in clients:
                row = judge(layout, Path(name), client, [rank[client] for rank in ranks])
                print(f"{layout:18} {client:12} {len(row['differing']):3} differ, error {row['error']:.1e}, {row['left']} left, "
                      f"{row['rows']} rows, {row['ours']} of ours {row['differing'][:3]}", flush=True)
    for (client, layout), why in LEFT_OUT.items():
        print(f"{layout:18} {client:12} does not exist: {why}")


if __name__ == "__main__":
    main(sys.argv[1:])
