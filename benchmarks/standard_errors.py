# SPDX-License-Identifier: Apache-2.0
"""`mir_se` against the standard deviation of MIR over redrawn probes, where other probes have other outliers.

    python benchmarks/standard_errors.py --output benchmarks/results/standard_errors.md

Some samples have longer tokens, in images, in texts, or in both. Each law is drawn with two sizes of vision tokens, and
a cell has both ratios. The last column is of the difference between two values on one probe: vision tokens of the
second model are shorter and turned a little, and the ratio is of the paired error that `mir compare` takes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from measuring import options_of, publish, table

from mir_callback import modality_integration_rate

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.metric.draws import DIM, IMAGE, SAMPLES, WORDS, Lengths, Rows, draw, longer, pareto
from tests.metric.solving import evaluate_rows

LAWS: dict[str, Lengths] = {
    "none": longer(0.0, 1.0),
    **{f"{share:.0%} x{factor:.0f}": longer(share, factor) for share in (0.05, 0.08, 0.1) for factor in (3.0, 4.0)},
    "20% x3": longer(0.2, 3.0),
    **{f"Pareto, index {index}": pareto(index) for index in (3.0, 2.0, 1.5)},
    "2% x10": longer(0.02, 10.0),
}
TURN = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(2)).double())[0]


def second_model(rows: Rows) -> Rows:
    """Another model's rows of the same samples."""
    vision, text = rows
    return 0.9 * (0.8 * vision + 0.2 * vision @ TURN), text


def rate(rows: Rows) -> float:
    """MIR of one layer."""
    vision, text = rows
    return modality_integration_rate([vision.flatten(0, 1)], [text.flatten(0, 1)]).mir


def measure(law: Lengths, where: str, size: float, probes: int, errors: int) -> tuple[float, float, float]:
    """Mean error over true deviation: as it is, with outliers as given, and of a difference between two models."""
    drawn = [draw(seed, law, where, size) for seed in range(probes)]
    values = np.array([[rate(rows), rate(second_model(rows))] for rows in drawn])
    found = []
    for seed in range(probes, probes + errors):
        rows = draw(seed, law, where, size)
        (_, one), (_, other) = evaluate_rows(*rows), evaluate_rows(*second_model(rows))
        difference = np.subtract(one["influences"], other["influences"]).std(ddof=1) / SAMPLES**0.5
        found.append((one["mir_se"], one["mir_se"] / one["outlier_se_ratio"], difference))
    deviation, of_difference = values[:, 0].std(ddof=1), np.diff(values).std(ddof=1)
    error, given, paired = np.mean(found, axis=0)
    return error / deviation, given / deviation, paired / of_difference


def main() -> None:
    """Print the table, and write it where asked."""
    options = options_of(
        __doc__ or "",
        probes={"type": int, "default": 1000, "help": "redrawn for the true deviation"},
        errors={"type": int, "default": 60, "help": "whose mean is compared with it"},
    )
    rows = []
    for name, law in LAWS.items():
        for where in ("both",) if name == "none" else ("images", "texts", "both"):
            found = [measure(law, where, size, options.probes, options.errors) for size in (2.0, 15.0)]
            rows.append(
                [name, where, *("; ".join(f"{ratio:.2f}" for ratio in both) for both in zip(*found, strict=True))]
            )
            print(*rows[-1], file=sys.stderr)
    sizes = f"{SAMPLES} samples of {IMAGE} vision and {WORDS} text tokens in {DIM} dimensions"
    draws = (
        f"{options.probes} redrawn probes, mean of {options.errors} errors; vision tokens of 2 and 15 times the size"
    )
    header = ["longer", "in", "mir_se / deviation", "outliers as given", "error / deviation of a difference"]
    publish(options.output, f"{sizes}; {draws}.", table(header, rows))


if __name__ == "__main__":
    main()
