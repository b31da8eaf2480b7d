# SPDX-License-Identifier: Apache-2.0
"""Float64 products and factorisations, by whichever library is fast where the matrix lies.

PyTorch's CPU builds come with Intel's MKL, which on processors of other makers does not use their widest instructions.
It was measured at half the speed of NumPy's OpenBLAS (d = 1024: products, Cholesky factors) and a third (eigenvalues),
and NumPy notices besides that X^T X is symmetric, which halves its cost once more. So matrices on a CPU go through
NumPy, without a copy of either the arguments or the results; those on a GPU stay with PyTorch. Nothing here is
differentiated through.

Both libraries take their number of threads from OMP_NUM_THREADS, as torchrun sets it; `torch.set_num_threads` has no
effect on what is done here.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` of float64 matrices (m, k) and (k, n); half the work where one is the other's transpose."""
    if left.device.type != "cpu":
        return left @ right
    return torch.from_numpy(np.matmul(_array(left), _array(right)))


def gram(rows: Tensor) -> Tensor:
    """``rows^T rows``, (d, d), of rows (n, d) in float64. Ranks: pure."""
    return product(rows.T, rows)


def cholesky(matrix: Tensor) -> Tensor | None:
    """Lower L with L L^T = matrix (d, d) in float64, or None if it is not positive definite to working precision.

    Only the lower triangle of ``matrix`` is read. Ranks: pure.
    """
    lower: Tensor
    if matrix.device.type != "cpu":
        lower, info = torch.linalg.cholesky_ex(matrix)
        return None if info.item() else lower
    try:
        lower = torch.from_numpy(np.linalg.cholesky(_array(matrix)))
    except np.linalg.LinAlgError:
        return None
    return lower


def eigvalsh(matrix: Tensor) -> Tensor:
    """Eigenvalues (d,), ascending, of a symmetric float64 matrix; its lower triangle is read. Ranks: pure."""
    values: Tensor
    if matrix.device.type != "cpu":
        values = torch.linalg.eigvalsh(matrix)
    else:
        values = torch.from_numpy(np.linalg.eigvalsh(_array(matrix)))
    return values


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (d,), ascending, and eigenvectors (d, d) in columns, of a symmetric float64 matrix. Ranks: pure."""
    values: Tensor
    vectors: Tensor
    if matrix.device.type != "cpu":
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    found = np.linalg.eigh(_array(matrix))
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values (min(m, n),), descending, of a float64 matrix (m, n). Ranks: pure."""
    values: Tensor
    if matrix.device.type != "cpu":
        values = torch.linalg.svdvals(matrix)
    else:
        values = torch.from_numpy(np.linalg.svd(_array(matrix), compute_uv=False))
    return values


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, m), the singular values, descending, and V^T (n, n) of a float64 matrix (m, n). Ranks: pure."""
    left: Tensor
    values: Tensor
    right: Tensor
    if matrix.device.type != "cpu":
        left, values, right = torch.linalg.svd(matrix)
        return left, values, right
    found = np.linalg.svd(_array(matrix))
    return torch.from_numpy(found[0]), torch.from_numpy(found[1]), torch.from_numpy(found[2])


def _array(matrix: Tensor) -> Array:
    """The same memory as NumPy sees it."""
    array: Array = matrix.detach().numpy()
    return array
