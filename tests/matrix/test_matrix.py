# SPDX-License-Identifier: Apache-2.0
"""Clients x layouts, each without MIR and with it: 0 differing bits, whole log rows, right values, all in its shards.

As a script it prints the matrix: `python -m tests.matrix.test_matrix [LAYOUT...]`.
"""

import os
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from mir_callback import evaluate_mir
from tests.distributed.launch import run_ranks
from tests.matrix.clients import CLIENTS, PROBE, STEPS, lightning, make_model, watching

# Each is started once, for all clients in it.
LAYOUTS = ("one", "ddp", "zero2", "zero3", "fsdp2")
# Set-ups beside the five, and the clients that are run in them.
EXTRAS = {
    "fsdp1": ("huggingface", "accelerate", "plain"),
    "fsdp2 HSDP": ("lightning", "plain"),
    "fsdp2 CPU offload": ("lightning", "plain"),
    "fsdp2 bfloat16": ("lightning", "plain"),
    "fsdp2 LoRA": ("trl", "huggingface", "plain"),
}
# Pairs that do not exist, and why; `test_pairs_left_out_do_not_exist` sees that it is so.
NO_CPU = "Lightning's DeepSpeedStrategy runs on CUDA only"
LEFT_OUT = {("lightning", "zero2"): NO_CPU, ("lightning", "zero3"): NO_CPU}
# The rest is run by `make test-all`.
FAST = {(layout, client) for layout in ("one", "ddp", "fsdp2") for client in CLIENTS} | {("zero3", "trl")}
SAME = ("rows", "weights", "optimizer", "random", "flags")


def clients_of(layout):
    return [each for each in EXTRAS.get(layout, CLIENTS) if (each, layout) not in LEFT_OUT]


def run_layout(layout, folder, clients):
    """What each rank found, by client."""
    processes = None if layout == "one" else 2
    return run_ranks("tests.matrix.worker", folder, layout, ",".join(clients), processes=processes)


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


def reference(layout, weights):
    """The value of one process with these weights."""
    model, processor = make_model(layout)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not {*missing} & {name for name, _ in model.named_parameters()}
    if "bfloat16" in layout:
        for parameter in model.parameters():  # and no buffers, which FSDP leaves as they are
            parameter.data = parameter.data.bfloat16()
    return evaluate_mir(model, PROBE, processor=processor, batch_size=watching(layout)["batch_size"]).mir


def judge(layout, folder, client, ranks):
    """A row of the matrix."""
    plain, watched = ranks[0][client]["plain"], ranks[0][client]["watched"]
    value = reference(layout, torch.load(folder / client / "watched" / "weights.pt"))
    return {
        "differing": sorted(
            {each for rank in ranks for each in differing(rank[client]["plain"], rank[client]["watched"])}
        ),
        "error": abs(value - watched["history"][-1]["mir"]),
        "left": max(max(rank[client]["watched"]["left"]) for rank in ranks),
        "losses": [float(row["loss"]) for row in plain["rows"] if "loss" in row],
        "steps": [record["step"] for record in watched["history"]],
        "values": {record["mir"] for record in watched["history"]},
        "ours": watched["ours"],
        "seconds": sum(rank[client][what]["seconds"] for rank in ranks for what in ("plain", "watched")),
    }


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """Run a layout once for the fast clients in it, and once for the others."""
    done = {}

    def run(layout, client):
        is_fast = (layout, client) in FAST
        if (layout, is_fast) not in done:
            folder = tmp_path_factory.mktemp(layout.replace(" ", "-"))
            clients = [each for each in clients_of(layout) if ((layout, each) in FAST) == is_fast]
            done[layout, is_fast] = folder, run_layout(layout, folder, clients)
        return done[layout, is_fast]

    return run


@pytest.mark.parametrize(
    ("layout", "client"),
    [
        pytest.param(layout, client, marks=() if (layout, client) in FAST else pytest.mark.slow)
        for layout in (*LAYOUTS, *EXTRAS)
        for client in clients_of(layout)
    ],
)
def test_training_is_the_same_and_measured_right(layouts, layout, client):
    folder, ranks = layouts(layout, client)
    found = judge(layout, folder, client, ranks)
    assert found["differing"] == []
    assert found["left"] == 0
    assert found["error"] < 1e-8
    assert found["steps"] == list(range(STEPS + 1))
    assert len(found["values"]) == STEPS + 1
    assert found["losses"]
    # A Trainer's rows are in its state and in what its callbacks get.
    assert found["ours"] == (STEPS + 1) * (2 if client in ("trl", "huggingface") else 1)


@pytest.mark.parametrize("client", CLIENTS)
def test_best_model_under_fsdp2_is_whole_and_has_the_lowest_value(layouts, client):
    folder, (first, _) = layouts("fsdp2", client)
    lowest = min(record["mir"] for record in first[client]["watched"]["history"][1:])
    weights = load_file(folder / client / "watched" / "mir_best" / "model.safetensors")
    saved, _ = make_model("fsdp2")
    model, found = type(saved).from_pretrained(None, config=saved.config, state_dict=weights, output_loading_info=True)
    assert not any(found.values())
    processor = make_model("fsdp2")[1]
    assert evaluate_mir(model, PROBE, processor=processor, batch_size=2).mir == pytest.approx(lowest, abs=1e-8)


@pytest.mark.parametrize("layout", sorted({layout for _, layout in LEFT_OUT}))
def test_pairs_left_out_do_not_exist(tmp_path, layout):
    # Lightning leaves the variables of a rank behind.
    with patch.dict(os.environ), pytest.raises(Exception, match="only supported on CUDA"):
        lightning(layout, tmp_path, None)


def main(chosen):
    """Print the matrix."""
    for layout in chosen or [*LAYOUTS, *EXTRAS]:
        with tempfile.TemporaryDirectory() as name:
            ranks = run_layout(layout, Path(name), clients_of(layout))
            for client in clients_of(layout):
                row = judge(layout, Path(name), client, ranks)
                print(
                    f"{layout:18} {client:12} {len(row['differing']):3} differ, error {row['error']:.1e}, "
                    f"{row['left']} left, {row['ours']} rows of ours, {row['seconds']:.1f} s of CPU",
                    *row["differing"][:3],
                    flush=True,
                )
    for (client, layout), why in LEFT_OUT.items():
        print(f"{layout:18} {client:12} does not exist: {why}")


if __name__ == "__main__":
    main(sys.argv[1:])
