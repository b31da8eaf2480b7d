# SPDX-License-Identifier: Apache-2.0
"""Exact distance of one layer against three other ways to it, and the libraries that it could use on a CPU.

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python benchmarks/solver.py        # d = 512, 1024, 2048
    python benchmarks/solver.py --dims 4096 --repeats 1

- sqrtm: scipy's matrix square root of the float32 product of the covariances, as the authors' accurate mode has it;
- inverses: ten steps of Y <- (Y + Z^-1 A) / 2, Z <- (Z + Y^-1 A) / 2 with explicit float32 inverses, from Y = A with
  A = S_v S_t and Z = 1, the kind of iteration their fast mode runs (its start is a fixed point, so that another number
  is found);
- eigvals: the root of each eigenvalue of the product S_v S_t, float64, the formula that torchmetrics' FID publishes.

The others use NumPy's and SciPy's BLAS; all start from the same covariances of hidden-state-like clouds, and computing
those is in none. They run alternately; the tables show medians, and medians of the ratios within a round. The second
table says which of PyTorch and NumPy is faster at what the exact distance is made of: `metric/linalg.py` follows it.
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
from mir_callback.metric.matrix_sqrt import GaussianPair
from mir_callback.metric.moments import moments_from_scatter

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
    clouds = [cloud(dim, spectrum, seed) for seed in (1, 2)]
    means = [rows.mean(dim=0) for rows in clouds]
    covariances = [torch.cov(rows.T) for rows in clouds]
    base = float((means[0] - means[1]).square().sum() + sum(each.trace() for each in covariances))
    values = {}

    def ours() -> None:
        # The scatter of two rows is their covariance; it is overwritten.
        parts = (moments_from_scatter(2, mean, each.clone()) for mean, each in zip(means, covariances, strict=True))
        values["ours"] = frechet_from_moments(GaussianPair(*parts)).distance

    def by_trace(name: str, trace: Callable[[Array, Array], float]) -> Callable[[], None]:
        def call() -> None:
            values[name] = base - 2.0 * trace(*(each.numpy() for each in covariances))

        return call

    others = {"sqrtm": by_sqrtm, "inverses": by_inverses, "eigvals": by_eigenvalues_of_product}
    taken = alternate({"ours": ours} | {name: by_trace(name, trace) for name, trace in others.items()}, repeats)
    cells = [str(dim), spectrum, f"{statistics.median(taken['ours']):.3f}"]
    for name in others:
        off = abs(values[name] / values["ours"] - 1.0)
        cells += [f"{statistics.median(taken[name]):.3f}", f"{ratio(taken, name, 'ours'):.1f}", f"{off:.0e}"]
    return cells


def libraries(dim: int, repeats: int) -> list[str]:
    """How many times as fast NumPy is as PyTorch at one dimension."""
    rows = cloud(dim, "power law i^-0.6", 1)
    square = torch.cov(rows.T)
    array, square_array = rows.numpy(), square.numpy()
    pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "product": (lambda: rows @ square, lambda: array @ square_array),
        "X^T X": (lambda: rows.T @ rows, lambda: array.T @ array),
        "Cholesky": (lambda: torch.linalg.cholesky_ex(square), lambda: np.linalg.cholesky(square_array)),
        "eigenvalues": (lambda: torch.linalg.eigvalsh(square), lambda: np.linalg.eigvalsh(square_array)),
        "eigenvectors": (lambda: torch.linalg.eigh(square), lambda: np.linalg.eigh(square_array)),
        "SVD": (lambda: torch.linalg.svd(square), lambda: np.linalg.svd(square_array)),
    }
    ratios = []
    for ours, theirs in pairs.values():
        taken = alternate({"PyTorch": ours, "NumPy": theirs}, repeats)
        ratios.append(f"{ratio(taken, 'PyTorch', 'NumPy'):.2f}")
    return [str(dim), *ratios]


def main() -> None:
    """Print the tables, and write them where asked."""
    options = options_of(
        __doc__,
        dims={"type": int, "nargs": "+", "default": [512, 1024, 2048]},
        repeats={"type": int, "default": 2},
    )
    header = ["d", "spectrum", "exact (s)"]
    for name in ("sqrtm", "inverses", "eigvals"):
        header += [f"{name} (s)", "ratio", "off by"]
    kinds = ["product", "X^T X", "Cholesky", "eigenvalues", "eigenvectors", "SVD"]
    publish(
        options.output,
        f"{machine('scipy')}; medians of {options.repeats} alternating runs; off by: relative to the exact distance",
        table(header, [row(dim, spectrum, options.repeats) for dim in options.dims for spectrum in SPECTRA]),
        "PyTorch's time over NumPy's, float64, X with 2 d rows:",
        table(["d", *kinds], [libraries(dim, options.repeats) for dim in options.dims]),
    )


if __name__ == "__main__":
    main()
