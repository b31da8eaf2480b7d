# SPDX-License-Identifier: Apache-2.0
"""A covariance as a product A^T A, which is all that a solve needs of it: the covariance itself can be let go of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mir_callback.errors import NumericsError
from mir_callback.metric.blas import cholesky, eigh
from mir_callback.metric.moments import Moments

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Factored:
    """Count, mean and covariance of a cloud of token rows, the covariance by a factor.

    Attributes:
        count: number of rows n >= 2.
        mean: (d,) float64.
        factor: A (m, d) float64 with covariance = A^T A.
        kind: what A is: the centred "rows" over the root of n - 1, for n < d; Cholesky's upper "triangle"; or, where
            the covariance is singular, its "eigenvectors" times the roots of their eigenvalues.
        trace: of the covariance, 0-d float64.
        size: Frobenius norm of the covariance, 0-d float64.
    """

    count: int
    mean: Tensor
    factor: Tensor
    kind: Literal["rows", "triangle", "eigenvectors"]
    trace: Tensor
    size: Tensor


def factored(moments: Moments) -> Factored:
    """The same cloud with a factor in place of the covariance.

    Directions whose variance is below the rounding of the covariance itself carry no information and are dropped.

    Raises:
        NumericsError: the moments are not finite.

    Ranks: pure.
    """
    trace, size = moments.trace, moments.size
    require_finite(trace.item())
    if moments.factor is not None:
        return Factored(moments.count, moments.mean, moments.factor, "rows", trace, size)
    assert moments.covariance is not None
    lower = cholesky(moments.covariance)
    if lower is not None:
        return Factored(moments.count, moments.mean, lower.T, "triangle", trace, size)
    values, vectors = eigh(moments.covariance)
    kept = values > len(values) * _EPS * values[-1].clamp_min(0.0)
    factor = vectors[:, kept].T
    factor.mul_(values[kept].sqrt()[:, None])
    return Factored(moments.count, moments.mean, factor, "eigenvectors", trace, size)


def require_finite(base: float) -> None:
    """Raise NumericsError unless a trace, or a sum of them, is finite. Ranks: pure."""
    if not math.isfinite(base):
        raise NumericsError(f"moments must be finite, got a trace and mean gap of {base}; look for NaN or infinity")
