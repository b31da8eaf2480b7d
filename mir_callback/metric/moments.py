# SPDX-License-Identifier: Apache-2.0
"""Mean and covariance of one modality in one layer, in float64, built from parts that can be summed over ranks.

The covariance takes one of two forms: the d x d matrix itself, or, when there are fewer rows than dimensions, the
factor Y (n x d) with covariance = Y^T Y, which is smaller and keeps the solve exact for singular covariances.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mir_callback.metric import fixed_point
from mir_callback.metric.blas import gram, product
from mir_callback.metric.tokens import double_chunks

_PRODUCT_ROWS = 2048  # enough for products at full speed


@dataclass(frozen=True)
class Moments:
    """Count, mean and covariance of a cloud of token rows.

    Attributes:
        count: number of rows n >= 2.
        mean: (d,) float64.
        covariance: (d, d) float64 with divisor n - 1, or None when ``factor`` is given.
        factor: (n, d) float64 with covariance = factor^T factor, or None when ``covariance`` is given.
    """

    count: int
    mean: Tensor
    covariance: Tensor | None = None
    factor: Tensor | None = None

    @property
    def trace(self) -> Tensor:
        """Trace of the covariance, 0-d float64."""
        if self.factor is not None:
            return self.factor.square().sum()
        assert self.covariance is not None
        return self.covariance.diagonal().sum()

    @property
    def size(self) -> Tensor:
        """Frobenius norm of the covariance, 0-d float64; an upper bound of its largest eigenvalue."""
        if self.factor is not None:
            return product(self.factor, self.factor.T).square().sum().sqrt()
        assert self.covariance is not None
        return self.covariance.square().sum().sqrt()

    def scaled(self, alpha: float) -> Moments:
        """Moments of ``alpha * rows``."""
        return Moments(
            count=self.count,
            mean=self.mean * alpha,
            covariance=None if self.covariance is None else self.covariance * alpha**2,
            factor=None if self.factor is None else self.factor * alpha,
        )


def row_sum(rows: Tensor) -> Tensor:
    """Sum of rows (N, d) of any floating dtype as (d,) float64; zeros for no rows. Ranks: pure."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for chunk in double_chunks(rows):
        total += chunk.sum(dim=0)
    return total


def scatter_about(rows: Tensor, mean: Tensor) -> Tensor:
    """Sum of outer products of ``rows - mean``, to the accuracy of float64 sums.

    Args:
        rows: (N, d), any floating dtype.
        mean: (d,) float64, the mean over all rows of all ranks.

    Returns:
        (d, d) float64; zeros for no rows.

    Ranks: pure; the results of the ranks add up to the scatter of all rows.
    """
    scatter = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    if fixed_point.is_possible(rows):
        fixed_point.add_scatter(scatter, rows, mean)
        return scatter
    # Centring before multiplying keeps large common means and massive dimensions from cancelling digits away.
    centred = torch.empty(min(_PRODUCT_ROWS, rows.shape[0]), rows.shape[1], dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[0], _PRODUCT_ROWS):
        chunk = rows[start : start + _PRODUCT_ROWS].detach()
        scatter += gram(centred[: len(chunk)].copy_(chunk).sub_(mean))
    return scatter


def moments_from_scatter(count: int, mean: Tensor, scatter: Tensor, scale: float = 1.0) -> Moments:
    """Moments of ``scale`` times ``count`` rows from their mean and their scatter (d, d) about it.

    The scatter is overwritten, as it may be large. Ranks: pure.
    """
    return Moments(count=count, mean=mean * scale, covariance=scatter.mul_(scale**2 / (count - 1)))


def moments_from_centred(mean: Tensor, centred: Tensor) -> Moments:
    """Moments in factor form from centred rows (n, d), for n < d. Ranks: pure."""
    count = centred.shape[0]
    return Moments(count=count, mean=mean, factor=centred.double() / (count - 1) ** 0.5)


def moments_of(rows: Tensor) -> Moments:
    """Mean and sample covariance of rows held in memory.

    Args:
        rows: (n, d), any floating dtype, n >= 2.

    Returns:
        Factor form when n < d, matrix form otherwise.

    Ranks: pure.
    """
    count, dim = rows.shape
    mean = row_sum(rows) / count
    if count < dim:
        return moments_from_centred(mean, rows.double() - mean)
    return moments_from_scatter(count, mean, scatter_about(rows, mean))
