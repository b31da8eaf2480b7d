# SPDX-License-Identifier: Apache-2.0
"""Token rows of every layer that are spread over ranks, and the statistics that all ranks share of them.

Every rank holds some rows of each layer and modality, maybe none. What is decided here (text scale, outliers, medians,
means) is decided from the rows of all ranks, so that it does not depend on how samples were spread.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from mir_callback import distributed as collectives
from mir_callback.errors import NumericsError
from mir_callback.metric.moments import Moments, moments_from_centred, moments_from_scatter, row_sum, scatter_about
from mir_callback.metric.tokens import (
    OutlierRule,
    lower_medians,
    lower_medians_of_shards,
    median_rounds,
    row_norms,
    text_centric_scale,
)

VISION, TEXT = 0, 1  # columns of the counts


@dataclass(frozen=True)
class SampleRows:
    """How many rows each sample has, and so which rows are whose. The same on every rank.

    Sample i is rank (i mod W)'s, see `share_of_rank`; a rank's rows lie in the order of its samples.

    Attributes:
        counts: for each rank (n_r, 2) int64 on the CPU, the vision and text rows of each of its samples.
    """

    counts: list[Tensor]

    @classmethod
    def shared(cls, mine: Tensor) -> SampleRows:
        """From this rank's counts (n_r, 2). Ranks: collective."""
        return cls(
            [torch.tensor(part, dtype=torch.int64).reshape(-1, 2) for part in collectives.gather_objects(mine.tolist())]
        )

    @property
    def num_samples(self) -> int:
        """Samples of the whole probe."""
        return sum(len(part) for part in self.counts)

    def totals(self, modality: int) -> Tensor:
        """Rows of each sample, (num_samples,) int64, in the probe's own order."""
        found = torch.zeros(self.num_samples, dtype=torch.int64)
        for rank, part in enumerate(self.counts):
            found[self._samples_of(rank)] = part[:, modality]
        return found

    def of_rank(self, rank: int, modality: int) -> Tensor:
        """Sample of each of a rank's rows, (n,) int64."""
        return torch.repeat_interleave(self._samples_of(rank), self.counts[rank][:, modality])

    def of_all_ranks(self, modality: int) -> Tensor:
        """Sample of each row of all ranks, in rank order, (N,) int64."""
        return torch.cat([self.of_rank(rank, modality) for rank in range(len(self.counts))])

    def _samples_of(self, rank: int) -> Tensor:
        return torch.arange(len(self.counts[rank])) * len(self.counts) + rank


@dataclass(frozen=True)
class Cloud:
    """One modality of one layer.

    Attributes:
        rows: this rank's rows, (n, d), n may be 0.
        outliers: (n,) bool, which of them the 3-sigma rule replaces.
        count: rows on all ranks.
        replaced: outliers on all ranks.
    """

    rows: Tensor
    outliers: Tensor
    count: int
    replaced: int


@dataclass(frozen=True)
class LayerClouds:
    """Both modalities of one layer.

    Attributes:
        vision: the vision rows.
        text: the text rows.
        scale: the factor that makes the mean text norm one.
        vision_norm: mean norm of the vision rows of all ranks, outliers included.
        text_norms: (s,) float64, norms of this rank's text rows, outliers included.
    """

    vision: Cloud
    text: Cloud
    scale: float
    vision_norm: float
    text_norms: Tensor


def share_norms(rows: list[tuple[Tensor, Tensor]]) -> list[LayerClouds]:
    """Decide text scale and outliers of every layer from the norms of all ranks.

    Args:
        rows: per layer this rank's vision and text rows, (r, d) and (s, d).

    Raises:
        NumericsError: fewer than two rows of a modality, or norms that are not finite; alike on every rank.

    Ranks: collective.
    """
    with collectives.all_or_none():
        vision, text = (torch.stack([row_norms(pair[i]) for pair in rows]) for i in (0, 1))
    all_vision, all_text = collectives.gather_columns(vision), collectives.gather_columns(text)
    with collectives.all_or_none():
        vision_norms, text_norms = torch.cat(all_vision, dim=1), torch.cat(all_text, dim=1)
        visions = _clouds([pair[0] for pair in rows], vision, vision_norms, "vision")
        texts = _clouds([pair[1] for pair in rows], text, text_norms, "text")
        scales = [text_centric_scale(norms) for norms in text_norms]
        lengths = vision_norms.mean(dim=1).tolist()
    return [LayerClouds(*parts) for parts in zip(visions, texts, scales, lengths, text, strict=True)]


def replace_outliers(layers: list[LayerClouds]) -> None:
    """Overwrite the outlier rows of all layers with the median of their cloud, in place.

    Ranks: collective; they agree on which clouds have outliers, as all know all norms.
    """
    affected = [
        cloud for cloud in chain.from_iterable((layer.vision, layer.text) for layer in layers) if cloud.replaced
    ]
    if not affected:
        return
    medians = _medians(affected)
    with collectives.all_or_none():
        for cloud, median in zip(affected, medians, strict=True):
            cloud.rows[cloud.outliers] = median


@dataclass
class CloudParts:
    """What the moments of one cloud are made of: the scatter about the mean, or the centred rows of all ranks.

    Attributes:
        count: rows on all ranks.
        mean: (d,) float64 of them.
        scatter: (d, d) float64, complete on the layer's owner, until it is taken; None where there are fewer rows than
            dimensions.
        columns: else every rank's centred rows, as columns (d, n_r).
    """

    count: int
    mean: Tensor
    scatter: Tensor | None
    columns: list[Tensor]

    def take_moments(self, scale: float) -> Moments:
        """The moments of the scaled rows; the scatter becomes theirs, so that it is there once. Ranks: the owner."""
        if self.scatter is not None:
            scatter, self.scatter = self.scatter, None
            return moments_from_scatter(self.count, self.mean, scatter, scale)
        return moments_from_centred(self.mean, torch.cat(self.columns, dim=1).T).scaled(scale)


def share_parts(layer: LayerClouds, owner: int) -> tuple[CloudParts, CloudParts]:
    """What the moments of vision and text over all ranks are made of; complete on rank ``owner``.

    Local work behind the last sum is left to the owner, who does it where its failure becomes one of all ranks.

    Ranks: collective.
    """
    clouds = (layer.vision, layer.text)
    with collectives.all_or_none():
        sums = torch.stack([row_sum(cloud.rows) for cloud in clouds])
    collectives.sum_over_ranks(sums)
    with collectives.all_or_none():  # the largest allocations of an evaluation after its forwards
        means = [total / cloud.count for cloud, total in zip(clouds, sums, strict=True)]
        mine = [_own_part(cloud, mean) for cloud, mean in zip(clouds, means, strict=True)]
    vision, text = (
        _shared_part(cloud, mean, part, owner) for cloud, mean, part in zip(clouds, means, mine, strict=True)
    )
    return vision, text


def _clouds(rows: list[Tensor], mine: Tensor, everyone: Tensor, name: str) -> list[Cloud]:
    """Per layer this rank's cloud, from its own and from all ranks' norms (L, n). Ranks: pure."""
    _check_norms(everyone, name)
    clouds = []
    for layer_rows, norms, all_norms in zip(rows, mine, everyone, strict=True):
        rule = OutlierRule.from_norms(all_norms)
        clouds.append(Cloud(layer_rows, rule.outliers(norms), len(all_norms), int(rule.outliers(all_norms).sum())))
    return clouds


def _medians(clouds: list[Cloud]) -> list[Tensor]:
    """Lower medians of clouds over all ranks. Ranks: collective."""
    rows = [cloud.rows for cloud in clouds]
    if collectives.world_size() == 1:
        return [lower_medians(each) for each in rows]
    with collectives.all_or_none():
        counts = torch.zeros(len(rows), rows[0].shape[1], dtype=torch.int64, device=rows[0].device)
    return collectives.sum_in_rounds(
        lambda add: lower_medians_of_shards(rows, [cloud.count for cloud in clouds], add),
        median_rounds(rows[0].dtype),
        like=counts,
    )


def _check_norms(norms: Tensor, name: str) -> None:
    if norms.shape[1] < 2:
        raise NumericsError(
            f"{name} must have at least 2 tokens over the whole probe, got {norms.shape[1]}; use more samples"
        )
    bad = (~torch.isfinite(norms)).sum(dim=1)
    if bool(bad.any()):
        layer = int(bad.nonzero()[0])
        raise NumericsError(
            f"layer {layer + 1}, {name}: hidden states must be finite, got NaN or infinity in {int(bad[layer])} of "
            f"{norms.shape[1]} tokens; the run may have diverged or overflowed its dtype"
        )


def _own_part(cloud: Cloud, mean: Tensor) -> Tensor:
    """This rank's scatter (d, d), or its centred rows as columns (d, n) where there are fewer rows than dimensions."""
    if cloud.count < cloud.rows.shape[1]:
        return (cloud.rows.double() - mean).T.contiguous()
    return scatter_about(cloud.rows, mean)


def _shared_part(cloud: Cloud, mean: Tensor, part: Tensor, owner: int) -> CloudParts:
    if cloud.count < cloud.rows.shape[1]:
        return CloudParts(cloud.count, mean, None, collectives.gather_columns(part))
    return CloudParts(cloud.count, mean, collectives.sum_to_rank(part, owner), [])
