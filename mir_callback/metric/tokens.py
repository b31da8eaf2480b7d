# SPDX-License-Identifier: Apache-2.0
"""Token rows before their moments: norms, the text-centric scale, the 3-sigma rule, medians.

Everything here is decided from row norms in float64, so that it costs one number per token to share between ranks.
The 3-sigma rule does not depend on the text-centric scale (both sides of its inequality scale alike), hence the rule
works on raw norms and the scale is applied to finished moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from mir_callback.errors import NumericsError

SIGMAS = 3.0
# Norms that should be equal differ by less than this share of them, from adding the same squares in another order.
_NORM_ROUNDING = 1024 * torch.finfo(torch.float64).eps
_GPU_ELEMENTS = 2**24  # numbers held in float64 at a time: enough to keep a GPU busy,
_CPU_ELEMENTS = 2**20  # few enough that a CPU uses the same memory again, as the system hands out fresh memory slowly
_MEDIAN_ELEMENTS = 2**21
_BYTE_ROWS = 240  # truth values that surely add up to a byte
_KEYS = {16: torch.int16, 32: torch.int32, 64: torch.int64}  # integers as wide as the floats


def iterate_in_float64(rows: Tensor) -> Iterator[Tensor]:
    """Pieces of ``rows`` in float64, at least one, so that a long matrix is never held twice. Ranks: pure."""
    elements = _CPU_ELEMENTS if rows.is_cpu else _GPU_ELEMENTS
    for chunk in rows.detach().split(max(1, elements // max(1, rows.shape[1]))):
        yield chunk.double()


def compute_row_norms(rows: Tensor) -> Tensor:
    """Euclidean norms (N,) float64 of rows (N, d) of any floating dtype, on their device. Ranks: pure."""
    return torch.cat([torch.linalg.vector_norm(chunk, dim=1) for chunk in iterate_in_float64(rows)])


def compute_text_scale(text_norms: Tensor) -> float:
    """The factor alpha that makes the mean of all raw text-token norms of a layer, (s,) float64, one. Ranks: pure.

    Raises NumericsError if it is zero or not finite.
    Source: arXiv:2410.07167, section 3 (text-centric normalisation).
    """
    mean = text_norms.mean().item()
    if not (0.0 < mean < float("inf")):
        raise NumericsError(
            f"the mean norm of the text tokens is {mean}, so that nothing can be scaled by it; "
            "check that the text rows are hidden states of real tokens"
        )
    return 1.0 / mean


@dataclass(frozen=True)
class OutlierRule:
    """The 3-sigma rule of one modality in one layer: a row is replaced if its norm is too far from the median norm."""

    median: float
    limit: float

    @classmethod
    def from_norms(cls, norms: Tensor) -> OutlierRule:
        """From the norms (N,) float64 of *all* rows of the modality, outliers included. Ranks: pure.

        Lower median and three unbiased standard deviations; of norms that are all equal but for the rounding of their
        float64 sums none is too far, as it would be decided by that rounding.
        Source: arXiv:2410.07167, section 3, with the replacement and the lower median of the authors' code.
        """
        # Sorted first: the sums behind std are then the same whatever order the ranks delivered the norms in.
        ordered = norms.sort().values
        median = ordered[(len(ordered) - 1) // 2].item()
        return cls(median=median, limit=max(SIGMAS * ordered.std().item(), _NORM_ROUNDING * median))

    def outliers(self, norms: Tensor) -> Tensor:
        """Which of these rows to replace, by their norms (N,) float64: (N,) bool. Ranks: pure."""
        return (norms - self.median).abs() > self.limit


def compute_lower_medians(rows: Tensor) -> Tensor:
    """Per-dimension lower medians of rows (N, d) of any floating dtype, N >= 1, as (d,). Ranks: pure."""
    if rows.is_cpu:
        return _partition(rows.detach())
    # Along the last dimension, where a GPU finds them several times faster.
    turned = rows.T.contiguous()
    with _any_algorithm():  # which of equal rows is the median may vary on a GPU, its value does not
        return turned.median(dim=1).values


def bisect_lower_medians(
    shards: list[Tensor], totals: list[int], sum_over_shards: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Exact per-dimension lower medians of row matrices that are spread over ranks.

    Bisects the integers that are in the order of the floats: as many rounds as the dtype has bits, each a count per
    dimension, and the rounds of all matrices share one reduction. Equal to ``torch.median(dim=0)`` of the stacked
    rows, to the last bit.

    Args:
        shards: this rank's rows of each matrix, (n_i, d) of one floating dtype; n_i may be 0.
        totals: rows of each matrix over all ranks, every one >= 1.
        sum_over_shards: adds an integer tensor over the ranks that hold rows; the identity on one. If it is
            collective, so is this.
    """
    if not shards:
        return []
    dtype, device = shards[0].dtype, shards[0].device
    info = torch.iinfo(_KEYS[torch.finfo(dtype).bits])
    wanted = torch.tensor([(total - 1) // 2 + 1 for total in totals], device=device)[:, None]
    # The smallest key with at least `wanted` rows at or below it lies in [low, high]; int64 holds the midpoints.
    # (float64 keys: the midpoint is formed from halves, as low + high itself would overflow.)
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
    """How many rows (N, d) lie at or below the pivot (d,) of each dimension, (d,) int64."""
    below = (rows <= pivots).view(torch.uint8)
    # Summed as bytes as far as they reach, which a GPU does several times faster than in wide integers.
    whole = len(below) // _BYTE_ROWS * _BYTE_ROWS
    groups = below[:whole].unflatten(0, (-1, _BYTE_ROWS)).sum(dim=1, dtype=torch.uint8) if whole else below[:0]
    return groups.sum(dim=0) + below[whole:].sum(dim=0)


def _partition(rows: Tensor) -> Tensor:
    """Lower medians by partitions of a few dimensions at a time; NumPy's take half the time of torch.median."""
    middle = (len(rows) - 1) // 2
    medians = torch.empty_like(rows[0])
    width = max(1, _MEDIAN_ELEMENTS // len(rows))
    for columns, found in zip(rows.split(width, dim=1), medians.split(width), strict=True):
        # NumPy knows no bfloat16, and partitions float16 slowly; both are exact in float32.
        wide = columns.to(torch.promote_types(rows.dtype, torch.float32)).contiguous()
        turned = wide.T.clone(memory_format=torch.contiguous_format).numpy()
        turned.partition(middle, axis=1)
        found.copy_(torch.from_numpy(turned[:, middle]))
    return medians


@contextmanager
def _any_algorithm() -> Iterator[None]:
    """Suspend `torch.use_deterministic_algorithms`, which refuses what would do no harm here."""
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
