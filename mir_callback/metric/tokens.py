# SPDX-License-Identifier: Apache-2.0
"""Token rows before moments: norms, text-centric scale, the 3-sigma rule, medians.

Scale and outliers depend on the row norms only, so that ranks exchange one float64 per token. The text-centric scale
does not change which rows are outliers, so the 3-sigma rule is applied to raw norms, and the scale to the moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mir_callback.errors import NumericsError

SIGMAS = 3.0
# By how many units of rounding (eps) of their dtype norms may differ that a norm layer has made equal. It rounds every
# value of a half-precision row once or twice; in float32 adding up the squares counts too, and those of transformers
# compute in float32 whatever the rows are.
_EQUAL_NORMS = {16: 1.0, 32: 8.0, 64: 8.0 * 2.0**29}
_GPU_ELEMENTS = 2**24  # numbers converted to float64 at a time: enough to keep a GPU busy,
_CPU_ELEMENTS = 2**20  # few enough that a CPU reuses the same memory, as fresh memory is slow
_MEDIAN_ELEMENTS = 2**21
_BYTE_ROWS = 240  # so many booleans add up to less than 256
_KEYS = {16: torch.int16, 32: torch.int32, 64: torch.int64}  # integers as wide as the floats


def iterate_in_float64(rows: Tensor) -> Iterator[Tensor]:
    """Chunks of ``rows`` in float64, at least one, so that a long matrix is not copied as a whole. Ranks: pure."""
    elements = _CPU_ELEMENTS if rows.is_cpu else _GPU_ELEMENTS
    for chunk in rows.detach().split(max(1, elements // max(1, rows.shape[1]))):
        yield chunk.double()


def compute_row_norms(rows: Tensor) -> Tensor:
    """Euclidean norms (N,) float64 of rows (N, d) of any floating dtype, on their device. Ranks: pure."""
    return torch.cat([torch.linalg.vector_norm(chunk, dim=1) for chunk in iterate_in_float64(rows)])


def compute_text_scale(text_norms: Tensor) -> float:
    """One over the mean of the raw text-token norms of a layer, (s,) float64. Ranks: pure.

    Raises NumericsError if the mean is zero or not finite.
    Source: arXiv:2410.07167, section 3 (text-centric normalisation).
    """
    mean = text_norms.mean().item()
    if not (0.0 < mean < float("inf")):
        raise NumericsError(
            f"The mean norm of the text tokens is {mean}, so hidden states cannot be scaled by it. Check that the text "
            "rows are hidden states of real tokens."
        )
    return 1.0 / mean


@dataclass(frozen=True)
class OutlierRule:
    """The 3-sigma rule of one modality in one layer: rows are outliers if their norm is too far from the median."""

    median: float
    limit: float
    rounding: float  # the lowest limit: norms this near may be equal but for the rounding of their rows

    @classmethod
    def from_norms(cls, norms: Tensor, dtype: torch.dtype) -> OutlierRule:
        """From the norms (N,) float64 of all rows of the modality, and the dtype of the rows. Ranks: pure.

        The limit is three unbiased standard deviations from the lower median, but at least the rounding of the norms,
        which would otherwise decide if all norms are equal, as behind a norm layer without weights.
        Source: arXiv:2410.07167, section 3, with the lower median of the authors' code.
        """
        # Sorted, so that std does not depend on the order in which ranks contribute.
        ordered = norms.sort().values
        median = ordered[(len(ordered) - 1) // 2].item()
        info = torch.finfo(dtype)
        rounding = _EQUAL_NORMS[info.bits] * info.eps * median
        return cls(median=median, limit=max(SIGMAS * ordered.std().item(), rounding), rounding=rounding)

    def outliers(self, norms: Tensor) -> Tensor:
        """Whether rows with these norms (N,) float64 are outliers, (N,) bool. Ranks: pure."""
        return (norms - self.median).abs() > self.limit


def compute_lower_medians(rows: Tensor) -> Tensor:
    """Per-dimension lower medians of rows (N, d) of any floating dtype, N >= 1, as (d,). Ranks: pure."""
    if rows.is_cpu:
        return _partition(rows.detach())
    # Along the last dimension, which is several times faster on a GPU.
    transposed = rows.T.contiguous()
    with _nondeterministic_allowed():  # only the index of the median is nondeterministic, and it is not used
        return transposed.median(dim=1).values


def bisect_lower_medians(
    shards: list[Tensor], totals: list[int], sum_over_shards: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Exact per-dimension lower medians of row matrices that are spread over ranks.

    Bisection on integers with the same order as the floats: one round per bit of the dtype, in which each dimension
    counts the rows below the midpoint; the matrices share one reduction per round. The result is bit-identical to
    ``torch.median(dim=0)`` of the rows of all ranks.

    Args:
        shards: this rank's rows of each matrix, (n_i, d) of one floating dtype; n_i may be 0.
        totals: number of rows of each matrix over all ranks, >= 1.
        sum_over_shards: sums an integer tensor over ranks; the identity on one.

    Ranks: collective if ``sum_over_shards`` is.
    """
    if not shards:
        return []
    dtype, device = shards[0].dtype, shards[0].device
    info = torch.iinfo(_KEYS[torch.finfo(dtype).bits])
    wanted = torch.tensor([(total - 1) // 2 + 1 for total in totals], device=device)[:, None]
    # The smallest key with at least `wanted` rows at or below it is in [low, high]. The midpoint is computed from
    # halves, because low + high may overflow.
    low = torch.full((len(shards), shards[0].shape[1]), info.min, dtype=torch.int64, device=device)
    high = torch.full_like(low, info.max)
    for _ in range(info.bits):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        pivots = _floats_from_keys(middle, dtype)
        below = torch.stack([_count_at_most(shard, pivot) for shard, pivot in zip(shards, pivots, strict=True)])
        reached = sum_over_shards(below) >= wanted
        high = torch.where(reached, middle, high)
        low = torch.where(reached, low, middle + 1)
    return list(_floats_from_keys(high, dtype))


def _floats_from_keys(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Floats from int64 keys that are in the same order (-0.0 directly below 0.0)."""
    keys = keys.to(_KEYS[torch.finfo(dtype).bits])
    return torch.where(keys < 0, keys ^ torch.iinfo(keys.dtype).max, keys).view(dtype)


def _count_at_most(rows: Tensor, pivots: Tensor) -> Tensor:
    """Number of rows (N, d) at or below the pivot (d,) of each dimension, (d,) int64."""
    below = (rows <= pivots).view(torch.uint8)
    # Groups are summed as bytes, which is several times faster on a GPU than in wider integers.
    whole = len(below) // _BYTE_ROWS * _BYTE_ROWS
    groups = below[:whole].unflatten(0, (-1, _BYTE_ROWS)).sum(dim=1, dtype=torch.uint8) if whole else below[:0]
    return groups.sum(dim=0) + below[whole:].sum(dim=0)


def _partition(rows: Tensor) -> Tensor:
    """Lower medians by partitioning a few dimensions at a time; NumPy takes half the time of torch.median."""
    middle = (len(rows) - 1) // 2
    medians = torch.empty_like(rows[0])
    width = max(1, _MEDIAN_ELEMENTS // len(rows))
    for columns, found in zip(rows.split(width, dim=1), medians.split(width), strict=True):
        # NumPy has no bfloat16, and is slow with float16; float32 represents both exactly.
        wide = columns.to(torch.promote_types(rows.dtype, torch.float32)).contiguous()
        transposed = wide.T.clone(memory_format=torch.contiguous_format).numpy()
        transposed.partition(middle, axis=1)
        found.copy_(torch.from_numpy(transposed[:, middle]))
    return medians


@contextmanager
def _nondeterministic_allowed() -> Iterator[None]:
    """Suspend `torch.use_deterministic_algorithms`."""
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
