# SPDX-License-Identifier: Apache-2.0
"""Exact distance of one layer against scipy's `sqrtm` on the float32 product of the covariances.

    make bench                                    # d = 512, 1024, 2048
    python benchmarks/solver.py --dims 1024 --repeats 5 --output table.md

Both sides start from the same covariances of hidden-state-like clouds (power-law spectrum, common mean) and find the
distance; computing the covariances is in neither. They run alternately; the table shows medians and the ratio's.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy
import scipy.linalg
import torch

from mir_callback.metric.frechet import frechet_from_moments
from mir_callback.metric.moments import Moments, moments_of

# Standard deviation along the i-th direction of a cloud.
SPECTRA: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "power law i^-0.6": lambda i: i.double().pow(-0.6),
    "steep, 1 to 1e-6": lambda i: torch.logspace(0, -6, len(i), dtype=torch.float64),
}


def cloud(dim: int, spectrum_name: str, seed: int) -> torch.Tensor:
    """Rows with a given spectrum in a random basis and a common mean; (2 d, d) float64."""
    rng = torch.Generator().manual_seed(seed)
    spectrum = SPECTRA[spectrum_name](torch.arange(1, dim + 1))
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=rng, dtype=torch.float64))[0]
    rows = torch.randn(2 * dim, dim, generator=rng, dtype=torch.float64) * spectrum @ basis
    return rows + 0.2 * torch.randn(dim, generator=rng, dtype=torch.float64)


def by_sqrtm(vision: Moments, text: Moments) -> float:
    """The distance through scipy's matrix square root of the float32 product."""
    assert vision.covariance is not None
    assert text.covariance is not None
    first, second = (moments.covariance.float().numpy() for moments in (vision, text))
    root = np.trace(scipy.linalg.sqrtm(first @ second)).real
    gap = float((vision.mean - text.mean).square().sum())
    return gap + float(np.trace(first)) + float(np.trace(second)) - 2 * float(root)


def seconds(call: Callable[[], float]) -> tuple[float, float]:
    """Wall seconds and the value of one call."""
    started = time.perf_counter()
    value = call()
    return time.perf_counter() - started, value


def row(dim: int, spectrum: str, repeats: int) -> str:
    """Measure one dimension and spectrum."""
    vision, text = moments_of(cloud(dim, spectrum, 1)), moments_of(cloud(dim, spectrum, 2))
    ours, theirs, ratios = [], [], []
    for repeat in range(repeats + 1):
        print(f"d = {dim}: run {repeat} of {repeats}", file=sys.stderr)
        our_time, our_value = seconds(lambda: frechet_from_moments(vision, text).distance)
        their_time, their_value = seconds(lambda: by_sqrtm(vision, text))
        if repeat == 0:  # warm-up
            continue
        ours.append(our_time)
        theirs.append(their_time)
        ratios.append(their_time / our_time)
    difference = abs(our_value - their_value) / our_value
    return (
        f"| {dim} | {spectrum} | {statistics.median(ours):.3f} | {statistics.median(theirs):.3f} "
        f"| {statistics.median(ratios):.1f} | {difference:.1e} |"
    )


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    lines = [
        f"{torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}, "
        f"scipy {scipy.__version__}, numpy {np.__version__}; medians of {options.repeats} alternating runs",
        "",
        "| d | spectrum | exact (s) | float32 sqrtm (s) | sqrtm / exact | relative difference of the distances |",
        "|---|---|---|---|---|---|",
        *(row(dim, spectrum, options.repeats) for dim in options.dims for spectrum in SPECTRA),
    ]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(["`" + " ".join(["python", *sys.argv]) + "`", "", *lines]) + "\n")


if __name__ == "__main__":
    main()
