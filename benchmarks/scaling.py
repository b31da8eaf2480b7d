# SPDX-License-Identifier: Apache-2.0
"""What an evaluation costs against the number of samples, text tokens and layers, and against the width.

    python benchmarks/scaling.py

Each row varies one of them from the first row. Bare forwards and evaluations run alternately; medians. From the rows
`cost_model.py` finds this machine's rates by least squares; the last columns show what the model then says of each row.
"""

from __future__ import annotations

import statistics
from typing import Any

from cost_model import Shape, beyond_the_forward, fitted
from measuring import alternate, machine, options_of, publish, table
from random_llava import IMAGE_TOKENS, bare_forward, build, make_evaluator

BASE: dict[str, int] = {"hidden": 512, "layers": 4, "samples": 2, "text": 600}
VARIED: dict[str, tuple[int, ...]] = {"samples": (4, 8), "text": (300, 1200), "layers": (2, 8), "hidden": (256, 768)}
OPTIONS: dict[str, dict[str, Any]] = {"repeats": {"type": int, "default": 2}}


def measure(setting: dict[str, int], repeats: int) -> tuple[float, float]:
    """Median seconds of the bare forward and of the evaluation."""
    model = build(setting["hidden"], setting["layers"], tower_layers=1)
    evaluator = make_evaluator(model, setting["samples"], setting["text"], batch_size=2)
    taken = alternate(
        {
            "forward": bare_forward(model, evaluator),
            "evaluation": lambda: evaluator.evaluate(model, progress=False),
        },
        repeats,
    )
    return statistics.median(taken["forward"]), statistics.median(taken["evaluation"])


def main() -> None:
    """Print the table, and write it where asked."""
    options = options_of(__doc__, **OPTIONS)
    settings = [BASE, *({**BASE, name: value} for name, values in VARIED.items() for value in values)]
    measured = [measure(setting, options.repeats) for setting in settings]
    shapes = [
        Shape.llama(each["hidden"], each["layers"], each["samples"], IMAGE_TOKENS, each["text"]) for each in settings
    ]
    rates = fitted(shapes, [evaluation - forward for forward, evaluation in measured])
    rows = []
    for setting, shape, (forward, evaluation) in zip(settings, shapes, measured, strict=True):
        said = beyond_the_forward(shape, rates)
        rows.append(
            [
                *(str(value) for value in setting.values()),
                *(f"{value:.2f}" for value in (forward, evaluation, evaluation - forward, evaluation / forward, said)),
            ]
        )
    publish(
        options.output,
        f"{machine('transformers')}; float32, random weights, {IMAGE_TOKENS} image tokens a sample, batches of 2; "
        f"medians of {options.repeats} alternating runs",
        table(
            [*BASE, "bare forward (s)", "evaluation (s)", "beyond the forward (s)", "ratio", "by the model (s)"], rows
        ),
    )


if __name__ == "__main__":
    main()
