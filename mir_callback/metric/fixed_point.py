# SPDX-License-Identifier: Apache-2.0
"""Scatter of half-precision rows on a GPU's integer matrix units: exact sums, faster than float64.

Each dimension is written in fixed point, as three digits below the largest value it takes. Products of digits are
summed in 32-bit integers, which round nothing however many rows there are. So the result is that of values rounded to
2^-23 of the largest. Rounding to nearest does not add up; the float32 sums of matrix units, which are cut off, do.

Source: the splitting of Ootomo, Ozaki and Yokota, "DGEMM on integer matrix multiplication unit", Int. J. High Perform.
Comput. Appl. 38 (2024), with one scale for each dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
