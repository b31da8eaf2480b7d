# SPDX-License-Identifier: Apache-2.0
"""Peak memory of an evaluation against keeping all hidden states, as the authors' script does.

    python benchmarks/memory.py
    python benchmarks/memory.py --hidden 2048 --layers 16 --samples 16

Each way runs in a process of its own, after one bare forward has been made, and is charged with what it takes at most
beyond what the process held then:

- forward: the bare forward of the probe, one sample at a time;
- evaluation: `evaluate_mir`, one sample at a time;
- in passes: the same with a budget of a quarter of the rows, which takes several forwards of the probe;
- all hidden states: every sample's hidden states of all layers and positions are kept, then each layer's rows are
  stacked and its moments and the root of their product are found in float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scipy.linalg
import torch
from measuring import machine, options_of, publish, table
from random_llava import IMAGE_TOKENS, bare_forward, build, make_evaluator
from torch import Tensor, nn

from mir_callback.evaluation.evaluate import Evaluator
from mir_callback.evaluation.memory import PeakMemory

WAYS = ("forward", "evaluation", "evaluation in passes", "all hidden states")
OPTIONS: dict[str, dict[str, Any]] = {
    "hidden": {"type": int, "default": 1024},
    "layers": {"type": int, "default": 8},
    "samples": {"type": int, "default": 8},
    "text": {"type": int, "default": 300, "help": "text tokens a sample"},
    "way": {"choices": WAYS, "help": argparse.SUPPRESS},
}


@torch.no_grad()
def keep_everything(model: nn.Module, evaluator: Evaluator) -> None:
    """The order of work of the authors' script, in our own words."""
    kept: list[tuple[Tensor, ...]] = []
    for batch in evaluator.batches:
        kept.append(model(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states)
    for layer in range(1, len(kept[0])):
        covariances = []
        for modality in ("vision", "text"):
            masks = [getattr(batch.masks, modality) for batch in evaluator.batches]
            rows = torch.cat([states[layer][mask] for states, mask in zip(kept, masks, strict=True)])
            covariances.append(torch.cov(rows.T))
        scipy.linalg.sqrtm((covariances[0] @ covariances[1]).numpy()).trace()


def rows_of(options: argparse.Namespace) -> int:
    """Bytes of the rows of all layers."""
    return int(options.samples * (IMAGE_TOKENS + options.text) * options.hidden * options.layers * 4)


def work(options: argparse.Namespace) -> None:
    """Go one way and print the bytes it took."""
    model = build(options.hidden, options.layers, tower_layers=1)
    budget = rows_of(options) / 4e9 if options.way == "evaluation in passes" else None
    evaluator = make_evaluator(model, options.samples, options.text, batch_size=1, capture_budget_gb=budget)
    ways: dict[str, Callable[[], Any]] = {
        "forward": bare_forward(model, evaluator),
        "evaluation": lambda: evaluator.evaluate(model, progress=False),
        "evaluation in passes": lambda: evaluator.evaluate(model, progress=False),
        "all hidden states": lambda: keep_everything(model, evaluator),
    }
    with torch.no_grad():
        first = evaluator.batches[0]
        model(**first.inputs, use_cache=False, logits_to_keep=1)
    Path("/proc/self/clear_refs").write_text("5")  # what the process has used before counts no more
    peak = PeakMemory(torch.device("cpu"))
    ways[options.way]()
    print(json.dumps(peak.sample()))


def main() -> None:
    """Print the table, and write it where asked."""
    options = options_of(__doc__, **OPTIONS)
    if options.way:
        work(options)
        return
    own = [f"--{name}={getattr(options, name)}" for name in OPTIONS if name != "way"]
    taken = {}
    for way in WAYS:
        print(way, file=sys.stderr)
        done = subprocess.run([sys.executable, __file__, "--way", way, *own], stdout=subprocess.PIPE, check=True)
        taken[way] = json.loads(done.stdout.splitlines()[-1])
    matrix = options.hidden**2 * 8
    rows = [[way, f"{taken[way] / 2**20:.0f}", f"{(taken[way] - taken['forward']) / 2**20:.0f}"] for way in WAYS]
    publish(
        options.output,
        f"{machine('scipy', 'transformers')}; hidden {options.hidden}, {options.layers} layers, "
        f"{options.samples} samples of 576 image and {options.text} text tokens, float32, random weights; MiB beyond "
        "what was held before",
        table(["way", "peak MiB", "of them beyond the bare forward"], rows),
        f"Rows of all layers: {rows_of(options) / 2**20:.0f} MiB; a d x d matrix in float64: {matrix / 2**20:.0f} MiB.",
    )


if __name__ == "__main__":
    main()
