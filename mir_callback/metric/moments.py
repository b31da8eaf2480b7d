# SPDX-License-Identifier: Apache-2.0
"""Scatter of half-precision rows on a GPU's integer matrix units: exact sums, faster than float64.

Each dimension is written in fixed point, as three digits below the largest value it takes. Products of digits are
summed in 32-bit integers, which round nothing however many rows there are. So the result is that of values rounded to
2^-23 of the largest. Rounding to nearest does not add up; the float32 sums of matrix units, which are cut off, do.

Source: the splitting of Ootomo, Ozaki and Yokota, "DGEMM on integer matrix multiplication unit", Int. J. High Perform.
Comput. Appl. 38 (2024), with one scale for each dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mir_callback.metric import moments as fixed_point
from mir_callback.metric.linalg import gram, product
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


_LARGEST = 127.0  # digits lie in [-127, 127]
_BASE = 2.0 * _LARGEST  # a remainder of at most one half becomes a digit again
_DIGITS = 3
# Which digits are multiplied; products beyond these are below 2^-30 of the first.
_PAIRS = ((0, 0), (0, 1), (1, 1), (0, 2), (1, 2))
_BLOCK_ROWS = 2**17  # times 127^2 stays below 2^31
_BLOCK_ELEMENTS = 2**28  # 1 GiB in float32
_MULTIPLE = 8  # what integer products need of all sizes
_LEAST = 32


def is_possible(rows: Tensor) -> bool:
    """Whether :func:`add_scatter` takes these rows and is worth it. Ranks: pure."""
    half = rows.dtype in (torch.bfloat16, torch.float16)
    return rows.is_cuda and half and rows.shape[1] % _MULTIPLE == 0 and min(rows.shape) >= _LEAST


def add_scatter(scatter: Tensor, rows: Tensor, mean: Tensor) -> None:
    """Add the outer products of ``rows - mean`` to ``scatter``.

    Args:
        scatter: (d, d) float64.
        rows: (N, d) bfloat16 or float16; d a multiple of 8.
        mean: (d,) float64.

    Ranks: pure.
    """
    step = min(_BLOCK_ROWS, max(_LEAST, _BLOCK_ELEMENTS // rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        _add_block(scatter, rows[start : start + step], mean)


def _add_block(scatter: Tensor, rows: Tensor, mean: Tensor) -> None:
    digits, unit = _in_fixed_point(rows, mean)
    total = torch.zeros_like(scatter)
    for i, j in _PAIRS:
        product = torch._int_mm(digits[i], digits[j].T)
        weight = _BASE ** -(i + j)
        total.add_(product, alpha=weight)
        if i != j:
            total.add_(product.T, alpha=weight)
    scatter.add_(total.mul_(unit).mul_(unit[:, None]))


def _in_fixed_point(rows: Tensor, mean: Tensor) -> tuple[list[Tensor], Tensor]:
    """Digits (d, n) int8 of ``rows - mean``, the first first, and what one of the first stands for, (d,) float64.

    Dimensions come first, as integer products want what they sum over side by side; n is the number of rows filled up
    with zeros to a multiple of 8.
    """
    count, dim = rows.shape
    values = torch.zeros(dim, count + -count % _MULTIPLE, dtype=torch.float32, device=rows.device)
    torch.sub(rows.T, mean.float()[:, None], out=values[:, :count])
    least, most = torch.aminmax(values, dim=1)
    unit = (torch.maximum(-least, most) / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    values.div_(unit[:, None])
    digits = []
    for digit in range(_DIGITS):
        if digit:
            values.mul_(_BASE)
        nearest = values.round()
        digits.append(nearest.to(torch.int8))
        values -= nearest
    return digits, unit.double()
