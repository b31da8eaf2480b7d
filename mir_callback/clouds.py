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

from mir_callback import collectives
from mir_callback.errors import NumericsError
from mir_callback.metric.moments import Moments, moments_from_centred, moments_from_scatter, row_sum, scatter_about
from mir_callback.metric.tokens import (
    OutlierRule,
    lower_medians,
    lower_medians_of_shards,
    row_norms,
    text_centric_scale,
)


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
    """Both modalities of one layer, and the factor that makes the mean text norm one."""

    vision: Cloud
    text: Cloud
    scale: float


def share_norms(rows: list[tuple[Tensor, Tensor]]) -> list[LayerClouds]:
    """Decide text scale and outliers of every layer from the norms of all ranks.

    Args:
        rows: per layer this rank's vision and text rows, (r, d) and (s, d).

    Raises:
        NumericsError: fewer than two rows of a modality, or norms that are not finite; alike on every rank.

    Ranks: collective.
    """
    vision, text = (_share_modality([pair[i] for pair in rows], name) for i, name in enumerate(("vision", "text")))
    return [
        LayerClouds(vision_cloud, text_cloud, text_centric_scale(text_norms))
        for (vision_cloud, _), (text_cloud, text_norms) in zip(vision, text, strict=True)
    ]


def replace_outliers(layers: list[LayerClouds]) -> None:
    """Overwrite the outlier rows of all layers with the median of their cloud, in place.

    Ranks: collective; they agree on which clouds have outliers, as all know all norms.
    """
    affected = [
        cloud for cloud in chain.from_iterable((layer.vision, layer.text) for layer in layers) if cloud.replaced
    ]
    rows = [cloud.rows for cloud in affected]
    if collectives.world_size() == 1:
        medians = [lower_medians(each) for each in rows]
    else:
        medians = lower_medians_of_shards(rows, [cloud.count for cloud in affected], collectives.sum_over_ranks)
    for cloud, median in zip(affected, medians, strict=True):
        cloud.rows[cloud.outliers] = median


def shared_moments(layer: LayerClouds, owner: int) -> tuple[Moments, Moments]:
    """Text-scaled moments of vision and text over all ranks; complete on rank ``owner`` only. Ranks: collective."""
    clouds = (layer.vision, layer.text)
    with collectives.all_or_none():
        sums = torch.stack([row_sum(cloud.rows) for cloud in clouds])
    collectives.sum_over_ranks(sums)
    vision, text = (
        _cloud_moments(cloud, total / cloud.count, owner) for cloud, total in zip(clouds, sums, strict=True)
    )
    return vision.scaled(layer.scale), text.scaled(layer.scale)


def _share_modality(rows: list[Tensor], name: str) -> list[tuple[Cloud, Tensor]]:
    """Per layer: this rank's cloud, and the norms of all ranks' rows."""
    with collectives.all_or_none():
        mine = torch.stack([row_norms(layer_rows) for layer_rows in rows])
    everyone = collectives.gather_columns(mine)
    _check_norms(everyone, name)
    shared = []
    for layer_rows, norms, all_norms in zip(rows, mine, everyone, strict=True):
        rule = OutlierRule.from_norms(all_norms)
        cloud = Cloud(layer_rows, rule.outliers(norms), len(all_norms), int(rule.outliers(all_norms).sum()))
        shared.append((cloud, all_norms))
    return shared


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


def _cloud_moments(cloud: Cloud, mean: Tensor, owner: int) -> Moments:
    dim = cloud.rows.shape[1]
    if cloud.count < dim:
        centred = collectives.gather_columns((cloud.rows.double() - mean).T.contiguous()).T
        return moments_from_centred(mean, centred)
    with collectives.all_or_none():  # the largest allocation of an evaluation after its forwards
        scatter = scatter_about(cloud.rows, mean)
    collectives.sum_to_rank(scatter, owner)
    return moments_from_scatter(cloud.count, mean, scatter)
