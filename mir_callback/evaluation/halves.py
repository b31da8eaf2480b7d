# SPDX-License-Identifier: Apache-2.0
"""The two halves of a probe, as a gauge of the bias that a finite probe has.

A Frechet distance from a sample is larger than the true one, by about as much again when the sample is half as large.
So 2 FD - mean(FD of the halves) has most of that bias removed. It has noise of its own: a gauge, not a better MIR.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from torch import Tensor

from mir_callback import distributed as collectives
from mir_callback.evaluation.token_statistics import TEXT, VISION, Cloud, LayerClouds, SampleRows

LEAST_SAMPLES = 4  # of a probe that has halves


def half_of(layers: Sequence[LayerClouds], samples: SampleRows, parity: int) -> list[LayerClouds]:
    """The clouds of every other sample, scaled and with outliers replaced as in the whole probe.

    Args:
        layers: of the whole probe.
        samples: whose the rows are.
        parity: 0 for samples 0, 2, .., 1 for the others.

    Returns:
        Copies of this rank's rows of those samples.

    Ranks: pure; every rank's are halves of the same samples.
    """
    chosen = [samples.of_rank(collectives.rank(), modality) % 2 == parity for modality in (VISION, TEXT)]
    counts = [int(samples.totals(modality)[parity::2].sum()) for modality in (VISION, TEXT)]
    halves = []
    for layer in layers:
        vision, text = (
            _part(cloud, mask.to(cloud.rows.device), count)
            for cloud, mask, count in zip((layer.vision, layer.text), chosen, counts, strict=True)
        )
        norms = layer.text_norms[chosen[TEXT].to(layer.text_norms.device)]
        halves.append(LayerClouds(vision, text, layer.scale, layer.vision_norm, norms))
    return halves


def extrapolated(whole: Sequence[float], halves: Sequence[Sequence[float]]) -> float:
    """MIR with most of the bias of a finite probe removed, from FD_k of the whole probe and of its halves.

    Ranks: pure.
    """
    distances = [2.0 * of_all - fmean(of_halves) for of_all, *of_halves in zip(whole, *halves, strict=True)]
    total = math.fsum(max(0.0, distance) for distance in distances)
    return math.log10(total) if total > 0.0 else -math.inf


def _part(cloud: Cloud, mask: Tensor, count: int) -> Cloud:
    return Cloud(cloud.rows[mask], cloud.outliers[mask], count, 0)
