# SPDX-License-Identifier: Apache-2.0
"""Statistics of token rows that are spread over ranks: text scale, outliers, medians, means, scatters.

Every rank has some rows of each layer and modality, possibly none. All statistics are of the rows of all ranks, so that
they do not depend on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mir_callback import distributed
from mir_callback.errors import NumericsError
from mir_callback.metric.bootstrap import ResampledRule
from mir_callback.metric.moments import Moments, compute_scatter, moments_from_centred, moments_from_scatter, sum_rows
from mir_callback.metric.tokens import (
    OutlierRule,
    bisect_lower_medians,
    compute_lower_medians,
    compute_row_norms,
    compute_text_scale,
)
from mir_callback.watchdog import enter_phase

VISION, TEXT = 0, 1  # indices of modalities, e.g. columns of SampleRows.counts


@dataclass(frozen=True)
class SampleRows:
    """The number of rows of each sample, hence the sample of each row. The same on every rank.

    Each sample belongs to one rank; a rank's rows are in the order of its samples.
    """

    counts: list[Tensor]  # for each rank (n_r, 2) int64 on the CPU, number of vision and text rows of its samples
    indices: list[Tensor]  # for each rank (n_r,) int64 on the CPU, places of its samples in the probe

    @classmethod
    def gather(cls, counts: Tensor, indices: Sequence[int]) -> SampleRows:
        """From the counts (n_r, 2) and places of this rank's samples. Ranks: collective."""
        everyone = distributed.gather_objects((counts.tolist(), list(indices)))
        return cls(
            [torch.tensor(part, dtype=torch.int64).reshape(-1, 2) for part, _ in everyone],
            [torch.tensor(part, dtype=torch.int64) for _, part in everyone],
        )

    @property
    def num_samples(self) -> int:
        """Samples of the whole probe."""
        return sum(len(part) for part in self.counts)

    def totals(self, modality: int) -> Tensor:
        """Number of rows of each sample, (num_samples,) int64, in the order of the probe."""
        return self.in_probe_order([part[:, modality] for part in self.counts])

    def of_rank(self, rank: int, modality: int) -> Tensor:
        """Sample of each of a rank's rows, (n,) int64."""
        return torch.repeat_interleave(self.indices[rank], self.counts[rank][:, modality])

    def of_all_ranks(self, modality: int) -> Tensor:
        """Sample of each row of all ranks, in rank order, (N,) int64."""
        return torch.cat([self.of_rank(rank, modality) for rank in range(len(self.counts))])

    def in_probe_order(self, parts: Sequence[Tensor]) -> Tensor:
        """Values of every rank's samples, (n_r, ...) each, as those of all samples, (n, ...). Ranks: pure."""
        found = parts[0].new_zeros(self.num_samples, *parts[0].shape[1:])
        found[torch.cat(self.indices)] = torch.cat(list(parts))
        return found


@dataclass(frozen=True)
class ModalityRows:
    """One modality of one layer."""

    rows: Tensor  # this rank's, (n, d), n may be 0
    norms: Tensor  # (n,) float64, of the rows before any was replaced
    outliers: Tensor  # (n,) bool, rows that the 3-sigma rule replaces
    count: int  # number of rows on all ranks
    replaced: int  # number of outliers on all ranks
    resampled: ResampledRule | None  # None without standard errors
    spared: Tensor  # (m, d), of the outliers those that some draw of the samples keeps, as they were


@dataclass(frozen=True)
class LayerRows:
    """Both modalities of one layer."""

    vision: ModalityRows
    text: ModalityRows
    scale: float  # one over the mean text norm
    vision_norm: float  # mean norm of the vision rows of all ranks, outliers included


def clean_rows(rows: Sequence[tuple[Tensor, Tensor]], samples: SampleRows, first: int, errors: bool) -> list[LayerRows]:
    """Compute text scale and outliers of every layer from the norms of all ranks, and replace the outliers in place.

    ``rows`` are this rank's for each layer, vision (r, d) and text (s, d); ``first`` is the index of the first layer in
    the model. With ``errors`` the rule is also applied to resampled norms, for standard errors. Raises NumericsError,
    on every rank, if a modality has fewer than two rows or norms that are not finite.
    Ranks: collective.
    """
    enter_phase("norms of all tokens")
    with distributed.fail_together():
        vision, text = (torch.stack([compute_row_norms(pair[i]) for pair in rows]) for i in (VISION, TEXT))
    all_vision, all_text = distributed.gather_columns(vision), distributed.gather_columns(text)
    with distributed.fail_together():
        vision_norms, text_norms = torch.cat(all_vision, dim=1), torch.cat(all_text, dim=1)
        resampling = samples if errors else None
        visions = _find_outliers([pair[VISION] for pair in rows], vision, vision_norms, first, VISION, resampling)
        texts = _find_outliers([pair[TEXT] for pair in rows], text, text_norms, first, TEXT, resampling)
        scales = [compute_text_scale(norms) for norms in text_norms]
        lengths = vision_norms.mean(dim=1).tolist()
    layers = [LayerRows(*parts) for parts in zip(visions, texts, scales, lengths, strict=True)]
    enter_phase("outlier medians")
    # The same on every rank, because all ranks have all norms.
    affected = [part for layer in layers for part in (layer.vision, layer.text) if part.replaced]
    if affected:
        medians = _find_medians(affected)
        with distributed.fail_together():
            for part, median in zip(affected, medians, strict=True):
                part.rows[part.outliers] = median
    return layers


@dataclass
class MomentShard:
    """Sums for the moments of one modality: the scatter about the mean or, for fewer than d rows, the centred rows."""

    count: int  # number of rows on all ranks
    mean: Tensor  # (d,) float64, over all ranks
    scatter: Tensor | None  # (d, d) float64, complete on the layer's owner; None for fewer than d rows, or once taken
    columns: list[Tensor]  # for fewer than d rows the centred rows of every rank, as columns (d, n_r)

    def take_moments(self, scale: float) -> Moments:
        """The moments of the scaled rows. Overwrites the scatter, to save memory. Ranks: the owner."""
        if self.scatter is not None:
            scatter, self.scatter = self.scatter, None
            return moments_from_scatter(self.count, self.mean, scatter, scale)
        return moments_from_centred(self.mean, torch.cat(self.columns, dim=1).T, scale)


def reduce_moments(layer: LayerRows, owner: int) -> tuple[MomentShard, MomentShard]:
    """The sums for the moments of vision and text over all ranks, complete on rank ``owner``. Ranks: collective.

    The owner does the remaining local work, inside its own `fail_together`.
    """
    modalities = (layer.vision, layer.text)
    with distributed.fail_together():
        sums = torch.stack([sum_rows(part.rows) for part in modalities])
    distributed.sum_over_ranks(sums)
    with distributed.fail_together():  # may run out of memory: the largest allocations after the forwards
        means = [total / part.count for part, total in zip(modalities, sums, strict=True)]
        own = [_centred_or_scatter(part, mean) for part, mean in zip(modalities, means, strict=True)]
    shards = []
    for part, mean, mine in zip(modalities, means, own, strict=True):
        if part.count < part.rows.shape[1]:
            shards.append(MomentShard(part.count, mean, None, distributed.gather_columns(mine)))
        else:
            shards.append(MomentShard(part.count, mean, distributed.sum_to_rank(mine, owner), []))
    return shards[VISION], shards[TEXT]


def _find_outliers(
    rows: list[Tensor], own: Tensor, everyone: Tensor, first: int, modality: int, samples: SampleRows | None
) -> list[ModalityRows]:
    """One modality of each layer, from this rank's rows, their norms (L, n) and all norms (L, N). Ranks: pure."""
    name = ("vision", "text")[modality]
    if everyone.shape[1] == 0:
        raise NumericsError(
            f"The probe has no {name} tokens: no position of any sample is marked as {name}. Check the model's image "
            "token id, or what the adapter's encode returns."
        )
    if everyone.shape[1] < 2:
        raise NumericsError(f"The probe has one {name} token in total, too few for a covariance. Use more samples.")
    bad = (~torch.isfinite(everyone)).sum(dim=1)
    if bool(bad.any()):
        layer = int(bad.nonzero()[0])
        raise NumericsError(
            f"layer {first + layer + 1}: hidden states of {int(bad[layer])} of {everyone.shape[1]} {name} tokens are "
            "NaN or infinite. The model may have diverged, or its dtype overflowed."
        )
    of = None if samples is None else samples.of_all_ranks(modality).to(everyone.device)
    found = []
    for layer_rows, norms, all_norms in zip(rows, own, everyone, strict=True):
        rule = OutlierRule.from_norms(all_norms, layer_rows.dtype)
        outliers, replaced = rule.outliers(norms), int(rule.outliers(all_norms).sum())
        if samples is None or of is None:
            resampled, spared = None, layer_rows[:0]
        else:
            resampled = ResampledRule.from_norms(all_norms, of, samples.num_samples, rule)
            spared = layer_rows[outliers & resampled.undecided(norms)]
        found.append(ModalityRows(layer_rows, norms, outliers, len(all_norms), replaced, resampled, spared))
    return found


def _find_medians(modalities: list[ModalityRows]) -> list[Tensor]:
    """Lower medians of the rows of all ranks. Ranks: collective."""
    rows = [part.rows for part in modalities]
    if distributed.world_size() == 1:
        return [compute_lower_medians(each) for each in rows]
    with distributed.fail_together():
        counts = torch.zeros(len(rows), rows[0].shape[1], dtype=torch.int64, device=rows[0].device)
    return distributed.sum_in_rounds(
        lambda add: bisect_lower_medians(rows, [part.count for part in modalities], add),
        torch.finfo(rows[0].dtype).bits,
        like=counts,
    )


def _centred_or_scatter(part: ModalityRows, mean: Tensor) -> Tensor:
    """This rank's scatter (d, d), or its centred rows as columns (d, n) if all ranks have fewer than d rows."""
    if part.count < part.rows.shape[1]:
        return (part.rows.double() - mean).T.contiguous()
    return compute_scatter(part.rows, mean)
