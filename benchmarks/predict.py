# SPDX-License-Identifier: Apache-2.0
"""What evaluations of models of 7B to 72B on 8 to 1024 GPUs would take: predicted, not measured.

    python benchmarks/predict.py

Rates of the forward, the rows, the moments and the solve come from the tables that were measured on one H200
(`results/gpu_evaluation.md`, `results/gpu_parts.md`). What no table has is assumed, see ``ASSUMED``.
"""

from __future__ import annotations

from pathlib import Path

from cost_model import Rates, Shape, forward_flops, terms
from measuring import options_of, publish, table

RESULTS = Path(__file__).parent / "results"
# A probe of 100 samples, 576 image and 900 text tokens each; decoder layers of published models.
PROBE = (100, 576, 900)
MODELS = {
    "7B": Shape(4096, 32, 6.5e9, *PROBE),
    "13B": Shape(5120, 40, 12.7e9, *PROBE),
    "34B": Shape(7168, 60, 33.9e9, *PROBE),
    "72B": Shape(8192, 80, 70.2e9, *PROBE),
}
RANKS = (1, 8, 64, 256, 1024)
TERMS = ("forward", "weights", "rows", "moments", "solve", "messages")
# Not measured: a link of 50 GB/s a GPU, 30 us a collective and doubling of ranks, 40 TFLOP/s of float32 products; and
# the maps from the polar factor, four products, two triangular solves and two Cholesky factors, at the 30 TFLOP/s that
# the solve reaches with the same steps.
_MAP_FLOPS = 4 * 2 + 2 * 1 + 2 / 3
ASSUMED = {"byte": 1 / 50e9, "latency": 30e-6, "error_product": 2 / 40e12, "error_cube": _MAP_FLOPS / 30e12}


def column(name: str, *headers: str) -> float:
    """A number in the first row of a table in results/, by the header of its column: the first of these there is."""
    lines = [line for line in (RESULTS / name).read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    names, _, cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[:3])
    return float(next(cells[names.index(header)] for header in headers if header in names))


def measured_rates() -> Rates:
    """Rates of one H200, from its tables, and what is assumed."""
    shape = MODELS["7B"]
    tokens = shape.samples * shape.length
    parts = {name: column("gpu_parts.md", name) / 1e3 for name in ("norms", "medians", "moments", "solve")}
    return Rates(
        flop=column("gpu_evaluation.md", "bare forward (s)") / forward_flops(shape, shape.samples),
        number=(parts["norms"] + parts["medians"]) / (tokens * shape.hidden),
        product=parts["moments"] / (tokens * shape.hidden**2),
        cube=parts["solve"] / shape.hidden**3,
        error_product=ASSUMED["error_product"],
        error_cube=ASSUMED["error_cube"],
        byte=ASSUMED["byte"],
        latency=ASSUMED["latency"],
    )


def check(rates: Rates) -> str:
    """The model beside the one evaluation that was measured as a whole."""
    said = sum(terms(MODELS["7B"], rates, 1, errors=False).values())
    took = column("gpu_evaluation.md", "without standard errors (s)", "evaluation (s)")
    return f"Check: 7B on one GPU without standard errors, {said:.2f} s by the model, {took:.2f} s measured."


def main() -> None:
    """Print the table, and write it where asked."""
    options = options_of(__doc__)
    rates = measured_rates()
    header = ["model", "GPUs", *TERMS, "evaluation", "largest after forward and weights", "standard errors, more"]
    rows = []
    for name, shape in MODELS.items():
        for ranks in RANKS:
            found = terms(shape, rates, ranks)
            plain = terms(shape, rates, ranks, errors=False)
            largest = max(TERMS[2:], key=lambda term: plain[term])
            whole = sum(plain.values())
            seconds = (*(plain[term] for term in TERMS), whole)
            more = sum(found.values()) - whole
            rows.append([name, str(ranks), *(f"{value:.2f}" for value in seconds), largest, f"{more:.2f}"])
    publish(
        options.output,
        "Predicted by `cost_model.py`, in seconds; 100 samples of 576 image and 900 text tokens, bfloat16, ZeRO-3. "
        "From measured tables of one H200: forward, rows, moments, solve. Assumed: weights and messages at 50 GB/s a "
        "GPU and 30 us a collective and doubling of ranks; the standard errors' pass at 40 TFLOP/s in float32, "
        "their maps at 30 TFLOP/s in float64.",
        check(rates),
        table(header, rows),
    )


if __name__ == "__main__":
    main()
