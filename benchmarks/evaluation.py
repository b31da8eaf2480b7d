# SPDX-License-Identifier: Apache-2.0
"""A whole evaluation against the bare forward of its probe, on a LLaVA with random weights.

    python benchmarks/evaluation.py                                       # small, for a CPU
    python benchmarks/evaluation.py --device cuda --dtype bfloat16 --hidden 4096 --layers 32 --samples 100 --text 900

Bare forwards (no gradient, no cache, logits of one position) and evaluations run alternately: as they are by default,
and without standard errors. The table shows medians, medians of the ratios within a round, and the memory an evaluation
needs beyond the model.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from measuring import alternate, machine, options_of, publish, ratio, table
from random_llava import bare_forward, build, make_evaluator

OPTIONS: dict[str, dict[str, Any]] = {
    "device": {"default": "cpu"},
    "dtype": {"default": "float32"},
    "hidden": {"type": int, "default": 1024},
    "layers": {"type": int, "default": 4},
    "tower_layers": {"type": int, "help": "default: 24 on a GPU, 2 on a CPU"},
    "samples": {"type": int, "default": 8},
    "text": {"type": int, "default": 300, "help": "text tokens a sample"},
    "batch_size": {"type": int, "default": 4},
    "repeats": {"type": int, "default": 2},
}


def main() -> None:
    """Print the table, and write it where asked."""
    options = options_of(__doc__, **OPTIONS)
    on_cpu = options.device == "cpu"
    dtype = getattr(torch, options.dtype)
    model = build(options.hidden, options.layers, options.tower_layers or (2 if on_cpu else 24), options.device, dtype)
    sizes = (model, options.samples, options.text)
    whole = make_evaluator(*sizes, batch_size=options.batch_size)
    plain = make_evaluator(*sizes, batch_size=options.batch_size, standard_error=False)
    reports = []
    taken = alternate(
        {
            "forward": bare_forward(model, whole),
            "evaluation": lambda: reports.append(whole.evaluate(model, progress=False)),
            "no errors": lambda: plain.evaluate(model, progress=False),
        },
        options.repeats,
    )
    report = max(reports, key=lambda each: each.peak_memory_bytes)
    seconds = {name: f"{statistics.median(values):.2f}" for name, values in taken.items()}
    ratios = {name: f"{ratio(taken, name, 'forward'):.2f}" for name in taken}
    cells = {
        "hidden": str(options.hidden),
        "layers": str(options.layers),
        "vision tokens": str(report.num_vision_tokens),
        "text tokens": str(report.num_text_tokens),
        "bare forward (s)": seconds["forward"],
        "evaluation (s)": seconds["evaluation"],
        "ratio": ratios["evaluation"],
        "more GiB": f"{report.peak_memory_bytes / 2**30:.2f}",
        "without standard errors (s)": seconds["no errors"],
        "its ratio": ratios["no errors"],
    }
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    publish(
        options.output,
        f"{machine('transformers')}; {parameters:.2f} billion random weights, {options.dtype}; medians of "
        f"{options.repeats} alternating runs",
        table(list(cells), [list(cells.values())]),
    )


if __name__ == "__main__":
    main()
