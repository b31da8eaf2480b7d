# SPDX-License-Identifier: Apache-2.0
"""Nuclear norm of a matrix from its polar factor, with an error bound that is checked and not estimated.

What a GPU does fast is multiplying and Cholesky-factorising; reducing to tridiagonal form, as eigenvalue and singular
value solvers do, it does slowly. The dynamically weighted Halley iteration needs only the former: X -> the polar factor
Q of C = Q H, and the nuclear norm is tr H.

Source: Nakatsukasa, Bai and Gygi, "Optimizing Halley's iteration for computing the matrix polar decomposition", SIAM J.
Matrix Anal. Appl. 31 (2010), in its Cholesky form.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Singular values below this share of the largest are not followed all the way to one; the bound accounts for them.
_SMALLEST = 1e-9
_ITERATIONS = 4  # take singular values in [_SMALLEST, 1] to within 2e-7 of one, and the correction squares that
_ROUNDING = 1024.0  # of the iteration in units of eps; up to 450 was seen for condition numbers from 1e12 on
_EPS = torch.finfo(torch.float64).eps


def nuclear_norm(matrix: Tensor, near: Tensor | None = None) -> tuple[float, float] | None:
    """Sum of the singular values of a matrix and a bound of its error.

    Args:
        matrix: (m, n) float64.
        near: :func:`near_polar_factor` of it, if that is known already.

    Returns:
        The norm, and how far it can be off; None where a factorisation failed or nothing could be bounded. The bound is
        about 1e-10 of the norm for condition numbers up to 1e6, and grows to 1e-7 beyond.

    Ranks: pure.
    """
    near = near_polar_factor(matrix) if near is None else near
    if near is None:
        return None
    return _bounds(matrix, near) if matrix.shape[0] >= matrix.shape[1] else _bounds(matrix.T, near.T)


def near_polar_factor(matrix: Tensor) -> Tensor | None:
    """What has the singular vectors of a matrix (m, n), and singular values near one, or below for the smallest.

    None where a factorisation failed. Ranks: pure.
    """
    if matrix.shape[0] >= matrix.shape[1]:
        return _towards_polar_factor(matrix)
    turned = _towards_polar_factor(matrix.T)
    return None if turned is None else turned.T


def _towards_polar_factor(c: Tensor) -> Tensor | None:
    """(m, n) with the singular vectors of ``c``, m >= n, and singular values in [0, 1], near one."""
    gram = c.T @ c
    square = torch.linalg.matrix_norm(gram).item()  # at least the square of the largest singular value
    if not 0.0 < square < math.inf:
        return None
    x, gram = c / math.sqrt(square), gram / square
    least = _SMALLEST
    for iteration in range(_ITERATIONS):
        if iteration:
            gram = x.T @ x
        a, b, w = _weights(least)
        shifted = gram.mul_(w)
        shifted.diagonal().add_(1.0)
        lower, info = torch.linalg.cholesky_ex(shifted)
        if info.item():
            return None
        del gram, shifted
        solved = torch.cholesky_solve(x.T, lower).T
        x = x.mul_(b / w).add_(solved, alpha=a - b / w)
        del lower, solved
        least = least * (a + b * least**2) / (1.0 + w * least**2)
    return x


def _weights(least: float) -> tuple[float, float, float]:
    """Weights of the step x (a + b x^2) / (1 + c x^2) that lifts singular values in [least, 1] best."""
    spread = (4.0 * (1.0 - least**2) / least**4) ** (1 / 3)
    root = math.sqrt(1.0 + spread)
    a = root + math.sqrt(8.0 - 4.0 * spread + 8.0 * (2.0 - least**2) / (least**2 * root)) / 2.0
    b = (a - 1.0) ** 2 / 4.0
    return a, b, a + b - 1.0


def _bounds(c: Tensor, x: Tensor) -> tuple[float, float] | None:
    """Bounds of the nuclear norm of ``c`` from any ``x`` near its polar factor; the lower one and the gap.

    Q = x (3 - x^T x) / 2 has no singular value above one, and those of x near one are squared towards it. Lower: the
    nuclear norm is the largest inner product of ``c`` with such a Q, at least tr Q^T c. Upper: c = Q k + r with k the
    symmetric part of Q^T c, so the norm is at most ||k||_* + ||r||_*, and ||k||_* is tr k if k is shown to be positive,
    up to a shift, by its Cholesky factor.
    """
    n = c.shape[1]
    gram = x.T @ x
    if not _below_three(gram):
        return None
    polish = gram.mul_(-0.5)
    polish.diagonal().add_(1.5)
    k = polish @ (x.T @ c)
    k = k.add(k.T).mul_(0.5)
    polished = polish @ k
    del gram, polish
    rest = math.sqrt(n) * torch.linalg.matrix_norm(torch.addmm(c, x, polished, alpha=-1.0)).item()
    del polished
    lower = k.trace().item()
    size = torch.linalg.matrix_norm(c).item()
    shift = _ROUNDING * _EPS * size
    k.diagonal().add_(shift)
    if torch.linalg.cholesky_ex(k)[1].item():
        return None
    return lower, 2.0 * n * shift + rest + 8.0 * _EPS * n * size


def _below_three(gram: Tensor) -> bool:
    """Whether no eigenvalue of x^T x exceeds three, so that polishing x gives nothing longer than one."""
    if torch.linalg.matrix_norm(gram, 1).item() < 3.0:  # the largest column sum is at least the largest eigenvalue
        return True
    room = -gram
    room.diagonal().add_(3.0)
    return not torch.linalg.cholesky_ex(room)[1].item()
