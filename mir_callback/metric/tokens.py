# SPDX-License-Identifier: Apache-2.0
"""Token rows before their moments: norms, the text-centric scale, the 3-sigma rule.

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
# Numbers held in float64 at a time: for a GPU enough to keep it busy, for a CPU few enough to stay in its caches and in
# memory that is used again, as the system hands out fresh memory more slowly than rows are summed.
_CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": 2**24}
_PRODUCT_ELEMENTS = 2**20  # on a CPU where the rows are multiplied
_MEDIAN_ELEMENTS = 2**21
_BYTE_ROWS = 240  # truth values that surely add up to a byte

# Adds a tensor of integers over all holders of rows; the identity where one process holds all of them.
SumOverShards = Callable[[Tensor], Tensor]


def double_chunks(rows: Tensor, *, for_products: bool = False) -> Iterator[Tensor]:
    """Pieces of ``rows`` in float64, so that a long matrix is never held twice. Ranks: pure."""
    elements = _CHUNK_ELEMENTS.get(rows.device.type, _CHUNK_ELEMENTS["cuda"])
    if for_products:
        elements = max(elements, _PRODUCT_ELEMENTS)
    step = max(1, elements // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        yield rows[start : start + step].double()


def row_norms(rows: Tensor) -> Tensor:
    """Euclidean norm of each row.

    Args:
        rows: (N, d), any floating dtype.

    Returns:
        (N,) float64, on the device of ``rows``.

    Ranks: pure.
    """
    if rows.shape[0] == 0:
        return torch.zeros(0, dtype=torch.float64, device=rows.device)
    return torch.cat([torch.linalg.vector_norm(chunk, dim=1) for chunk in double_chunks(rows)])


def text_centric_scale(text_norms: Tensor) -> float:
    """The factor alpha that makes the mean text-token norm one.

    Args:
        text_norms: (s,) float64, the raw norms of all text rows of a layer.

    Returns:
        ``1 / mean(text_norms)``, float.

    Raises:
        NumericsError: the mean norm is zero or not finite.

    Ranks: pure.
    Source: arXiv:2410.07167, section 3 (text-centric normalisation).
    """
    mean = text_norms.mean().item()
    if not (0.0 < mean < float("inf")):
        raise NumericsError(
            f"text: the mean token norm must be positive and finite to scale by it, got {mean}; "
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
        """Build the rule from the norms of *all* rows of the modality, outliers included.

        Args:
            norms: (N,) float64, N >= 2.

        Returns:
            Lower median and three unbiased standard deviations of ``norms``; of norms that are all equal but for the
            rounding of their float64 sums none is too far, as it would be decided by that rounding.

        Ranks: pure.
        Source: arXiv:2410.07167, section 3, with the replacement and the lower median of the authors' code.
        """
        # Sorted first: the sums behind std are then the same whatever order the ranks delivered the norms in.
        ordered = norms.sort().values
        median = ordered[(len(ordered) - 1) // 2].item()
        return cls(median=median, limit=max(SIGMAS * ordered.std().item(), _NORM_ROUNDING * median))

    def outliers(self, norms: Tensor) -> Tensor:
        """Mark the rows to replace.

        Args:
            norms: (N,) float64, of all rows or of a part of them.

        Returns:
            (N,) bool, true where ``|norm - median| > 3 sd``.

        Ranks: pure.
        """
        return (norms - self.median).abs() > self.limit


_INTEGER_OF = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16}
_INTEGER_OF[torch.bfloat16] = torch.int16


def _float_of_key(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Floats from integers of the same width that are in the same order (-0.0 directly below 0.0)."""
    bits = torch.where(keys < 0, keys ^ torch.iinfo(keys.dtype).max, keys)
    return bits.view(dtype)


def _count_at_most(rows: Tensor, pivots: Tensor) -> Tensor:
    """How many rows (N, d) lie at or below the pivot (d,) of each dimension, (d,) int64."""
    below = (rows <= pivots).view(torch.uint8)
    # Summed as bytes as far as they reach, which a GPU does several times faster than in wide integers.
    whole = len(below) // _BYTE_ROWS * _BYTE_ROWS
    groups = below[:whole].unflatten(0, (-1, _BYTE_ROWS)).sum(dim=1, dtype=torch.uint8) if whole else below[:0]
    return groups.sum(dim=0) + below[whole:].sum(dim=0)


def lower_medians(rows: Tensor) -> Tensor:
    """Per-dimension lower medians of rows (N, d) of any floating dtype, N >= 1, as (d,). Ranks: pure."""
    if rows.device.type == "cpu":
        return _lower_medians_on_cpu(rows.detach())
    # Along the last dimension, where a GPU finds them several times faster.
    turned = rows.T.contiguous()
    with _any_algorithm():  # which of equal rows is the median may vary on a GPU, its value does not
        return turned.median(dim=1).values


def _lower_medians_on_cpu(rows: Tensor) -> Tensor:
    """By partitions of a few dimensions at a time, side by side; NumPy's take half the time of torch.median."""
    middle = (len(rows) - 1) // 2
    width = max(1, _MEDIAN_ELEMENTS // len(rows))
    medians = torch.empty_like(rows[0])
    for start in range(0, len(medians), width):
        # NumPy knows no bfloat16, and partitions float16 slowly; both are exact in float32.
        columns = rows[:, start : start + width].to(torch.promote_types(rows.dtype, torch.float32)).contiguous()
        turned = columns.T.clone(memory_format=torch.contiguous_format).numpy()
        turned.partition(middle, axis=1)
        medians[start : start + width] = torch.from_numpy(turned[:, middle])
    return medians


@contextmanager
def _any_algorithm() -> Iterator[None]:
    """Suspend `torch.use_deterministic_algorithms`, which refuses what would do no harm here."""
    strict, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)


def median_rounds(dtype: torch.dtype) -> int:
    """How often :func:`lower_medians_of_shards` sums over shards of rows of ``dtype``. Ranks: pure."""
    return torch.iinfo(_INTEGER_OF[dtype]).bits


def lower_medians_of_shards(shards: list[Tensor], totals: list[int], sum_over_shards: SumOverShards) -> list[Tensor]:
    """Exact per-dimension lower medians of row matrices that are spread over ranks.

    Bisects the integers that are in the order of the floats: as many rounds as the dtype has bits, each a count per
    dimension, and the rounds of all matrices share one reduction. Equal to ``torch.median(dim=0)`` of the stacked
    rows, to the last bit.

    Args:
        shards: this rank's rows of each matrix, (n_i, d) of one floating dtype; n_i may be 0.
        totals: rows of each matrix over all ranks, every one >= 1.
        sum_over_shards: adds an integer tensor over the ranks that hold rows; the identity on one.

    Returns:
        One (d,) tensor per matrix, in the dtype of the rows.

    Ranks: collective if ``sum_over_shards`` is; pure otherwise.
    """
    if not shards:
        return []
    dtype, device = shards[0].dtype, shards[0].device
    info = torch.iinfo(_INTEGER_OF[dtype])
    wanted = torch.tensor([(total - 1) // 2 + 1 for total in totals], device=device)[:, None]
    # The smallest key with at least `wanted` rows at or below it lies in [low, high]; int64 holds the midpoints.
    # (float64 keys: the midpoint is formed from halves, as low + high itself would overflow.)
    low = torch.full((len(shards), shards[0].shape[1]), info.min, dtype=torch.int64, device=device)
    high = torch.full_like(low, info.max)
    for _ in range(info.bits):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        pivots = _float_of_key(middle.to(_INTEGER_OF[dtype]), dtype)
        below = torch.stack([_count_at_most(shard, pivot) for shard, pivot in zip(shards, pivots, strict=True)])
        reached = sum_over_shards(below) >= wanted
        high = torch.where(reached, middle, high)
        low = torch.where(reached, low, middle + 1)
    return [_float_of_key(row.to(_INTEGER_OF[dtype]), dtype) for row in high]
