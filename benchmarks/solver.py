# SPDX-License-Identifier: Apache-2.0
"""Exact distance of one layer against three other ways to it.

    python benchmarks/solver.py                                   # d = 512, 1024, 2048
    python benchmarks/solver.py --dims 4096 --repeats 1

- sqrtm: scipy's matrix square root of the float32 product of the covariances, as the authors' accurate mode has it;
- inverses: ten steps of Y <- (Y + Z^-1 A) / 2, Z <- (Z + Y^-1 A) / 2 with explicit float32 inverses, from Y = A with
  A = S_v S_t and Z = 1, the kind of iteration their fast mode runs (its start is a fixed point, so that another number
  is found);
- eigvals: the root of each eigenvalue of the product S_v S_t, float64, the formula that torchmetrics' FID publishes.

All use the same library (NumPy's and SciPy's BLAS) and start from the same covariances of hidden-state-like clouds;
computing those is in none. They run alternately; the table shows medians, and medians of the ratios within a round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch
from measuring import alternate, machine, options_of, publish, ratio, table
from numpy.typing import NDArray
from torch import Tensor

from mir_callback.metric.frechet import frechet_from_moments
from mir_callback.metric.moments import Moments, compute_moments

Array = NDArray[np.floating]
STEPS = 10
# Standard deviation along the i-th direction of a cloud.
SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "power law i^-0.6": lambda i: i.double().pow(-0.6),
    "steep, 1 to 1e-6": lambda i: torch.logspace(0, -6, len(i), dtype=torch.float64),
}


def cloud(dim: int, spectrum_name: str, seed: int) -> Tensor:
    """Rows with a given spectrum in a random basis and a common mean; (2 d, d) float64."""
    rng = torch.Generator().manual_seed(seed)
    spectrum = SPECTRA[spectrum_name](torch.arange(1, dim + 1))
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=rng, dtype=torch.float64))[0]
    rows = torch.randn(2 * dim, dim, generator=rng, dtype=torch.float64) * spectrum @ basis
    return rows + 0.2 * torch.randn(dim, generator=rng, dtype=torch.float64)


def by_sqrtm(first: Array, second: Array) -> float:
    """Trace of scipy's matrix square root of the float32 product."""
    root = scipy.linalg.sqrtm(first.astype(np.float32) @ second.astype(np.float32))
    return float(root.trace().real)


def by_inverses(first: Array, second: Array) -> float:
    """Trace of where ten steps with explicit float32 inverses end."""
    product = first.astype(np.float32) @ second.astype(np.float32)
    y, z = product, np.eye(len(product), dtype=np.float32)
    for _ in range(STEPS):
        y = 0.5 * (y + np.linalg.inv(z) @ product)
        z = 0.5 * (z + np.linalg.inv(y) @ product)
    return float(y.trace())


def by_eigenvalues_of_product(first: Array, second: Array) -> float:
    """Sum of the roots of the product's eigenvalues, whose imaginary parts are rounding."""
    return float(np.sqrt(np.linalg.eigvals(first @ second).astype(complex)).real.sum())


def row(dim: int, spectrum: str, repeats: int) -> list[str]:
    """Measure one dimension and spectrum."""
    vision, text = compute_moments(cloud(dim, spectrum, 1)), compute_moments(cloud(dim, spectrum, 2))
    values = {}

    def by_trace(name: str, trace: Callable[[Array, Array], float]) -> Callable[[], None]:
        def call() -> None:
            values[name] = _distance(vision, text, trace)

        return call

    def ours() -> None:
        values["ours"] = frechet_from_moments(vision, text).distance

    taken = alternate(
        {
            "ours": ours,
            "sqrtm": by_trace("sqrtm", by_sqrtm),
            "inverses": by_trace("inverses", by_inverses),
            "eigvals": by_trace("eigvals", by_eigenvalues_of_product),
        },
        repeats,
    )
    cells = [str(dim), spectrum, f"{statistics.median(taken['ours']):.3f}"]
    for name in ("sqrtm", "inverses", "eigvals"):
        off = abs(values[name] / values["ours"] - 1.0)
        cells += [f"{statistics.median(taken[name]):.3f}", f"{ratio(taken, name, 'ours'):.1f}", f"{off:.0e}"]
    return cells


def _distance(vision: Moments, text: Moments, trace: Callable[[Array, Array], float]) -> float:
    """The distance with another way to the last trace."""
    assert vision.covariance is not None
    assert text.covariance is not None
    gap = (vision.mean - text.mean).square().sum()
    return float(gap + vision.trace + text.trace) - 2.0 * trace(vision.covariance.numpy(), text.covariance.numpy())


def main() -> None:
    """Print the table, and write it where asked."""
    options = options_of(
        __doc__,
        dims={"type": int, "nargs": "+", "default": [512, 1024, 2048]},
        repeats={"type": int, "default": 2},
    )
    header = ["d", "spectrum", "exact (s)"]
    for name in ("sqrtm", "inverses", "eigvals"):
        header += [f"{name} (s)", "ratio", "off by"]
    publish(
        options.output,
        f"{machine('scipy')}; medians of {options.repeats} alternating runs; off by: relative to the exact distance",
        table(header, [row(dim, spectrum, options.repeats) for dim in options.dims for spectrum in SPECTRA]),
    )


if __name__ == "__main__":
    main()
