# SPDX-License-Identifier: Apache-2.0
"""From token rows to the distances of layers: moments to each layer's owner rank, which solves; then influences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mir_callback import distributed
from mir_callback.evaluation.memory import PeakMemory
from mir_callback.evaluation.token_statistics import TEXT, VISION, LayerRows, MomentShard, SampleRows, reduce_moments
from mir_callback.metric.frechet import compute_companions, frechet_from_moments, warn_if_clipped
from mir_callback.metric.influence import (
    SampleSums,
    TransportMap,
    compute_influences,
    compute_transport_maps,
    sum_over_samples,
)
from mir_callback.metric.matrix_sqrt import GaussianPair
from mir_callback.watchdog import enter_phase


@dataclass(frozen=True)
class LayerResult:
    """The results of a layer. The same on every rank."""

    distance: float
    companions: dict[str, float]
    influences: Tensor | None  # (n,) float64 on the CPU, of each sample on the distance; None without standard errors
    vision_outliers: int  # number of rows replaced
    text_outliers: int
    dtype: str  # of the rows


@dataclass
class _Solution:
    """The results of a layer on its owner rank."""

    distance: float
    companions: dict[str, float]
    maps: tuple[TransportMap, TransportMap] | None = None
    sums: dict[int, Tensor] = field(default_factory=dict)  # over samples, of modalities whose rows it has gathered


def solve_layers(
    layers: Sequence[LayerRows], samples: SampleRows, first: int, root: str, errors: bool, bar: tqdm, peak: PeakMemory
) -> list[LayerResult]:
    """Distance of every layer and, with ``errors`` and root "exact", the influence of every sample on it.

    Layer k is solved by rank k mod world_size, one layer on each rank at a time. ``first`` is the index of the first of
    these layers in the model. Ranks: collective.
    """
    world, rank = distributed.world_size(), distributed.rank()
    sums = torch.zeros(len(layers), 3, samples.num_samples, dtype=torch.float64, device=layers[0].vision.rows.device)
    solved: dict[int, tuple[float, dict[str, float]]] = {}
    for start in range(0, len(layers), world):
        group = layers[start : start + world]
        group_sums = sums[start : start + world] if errors else None
        solution = _solve_group(group, samples, first + start, root, group_sums, peak)
        if solution is not None:
            solved[start + rank] = solution
        bar.update(len(group))
    everyone = {index: found for part in distributed.gather_objects(solved) for index, found in part.items()}
    if errors:
        sums = distributed.sum_over_ranks(sums).cpu()
    results = []
    for index, layer in enumerate(layers):
        distance, companions = everyone[index]
        vision, text, norms = sums[index]
        counted = SampleSums(vision, text, norms, samples.totals(VISION), samples.totals(TEXT))
        found = compute_influences(counted, distance, layer.scale) if errors else None
        dtype = str(layer.vision.rows.dtype).removeprefix("torch.")
        results.append(LayerResult(distance, companions, found, layer.vision.replaced, layer.text.replaced, dtype))
    return results


def _solve_group(
    group: Sequence[LayerRows], samples: SampleRows, first: int, root: str, sums: Tensor | None, peak: PeakMemory
) -> tuple[float, dict[str, float]] | None:
    """Solve one layer on each rank: distance and companions of this rank's, if any; adds to ``sums``, (W, 3, n)."""
    name, rank = f"layers {first + 1} to {first + len(group)}", distributed.rank()
    enter_phase(f"moments of {name}")
    means, own = [], None
    for owner, layer in enumerate(group):
        shards = reduce_moments(layer, owner)
        means.append((shards[VISION].mean, shards[TEXT].mean))
        own = shards if owner == rank else own
        del shards  # another rank's, before the next layer
    enter_phase(f"distances of {name}")
    with distributed.fail_together():
        errors = sums is not None
        solution = None if own is None else _solve(own, group[rank], samples, first + rank, root, errors, peak)
    del own
    if sums is not None:
        enter_phase(f"standard errors of {name}")
        maps = [_share_maps(layer, owner, solution if owner == rank else None) for owner, layer in enumerate(group)]
        with distributed.fail_together():
            peak.sample()
            for layer, pair_of_means, transports, counted in zip(group, means, maps, sums, strict=True):
                _add_rows(layer, pair_of_means, transports, samples, counted)
            for modality, counted in (solution.sums if solution else {}).items():
                sums[rank, modality] += counted
    return None if solution is None else (solution.distance, solution.companions)


def _solve(
    shards: tuple[MomentShard, MomentShard],
    layer: LayerRows,
    samples: SampleRows,
    index: int,
    root: str,
    errors: bool,
    peak: PeakMemory,
) -> _Solution:
    """Distance, companions and transport maps of a layer, on its owner rank."""
    norms = layer.vision_norm, 1.0 / layer.scale
    # One after the other, so that each covariance is freed once it is factored.
    pair = GaussianPair(*[shard.take_moments(layer.scale) for shard in shards], need_maps=errors)
    result = frechet_from_moments(pair, root)
    warn_if_clipped(result, index + 1, root)
    peak.sample()
    found = _Solution(result.distance, compute_companions(pair.vision, pair.text, result.distance, *norms))
    if errors:
        found.maps = compute_transport_maps(pair)
        difference = shards[VISION].mean - shards[TEXT].mean
        for modality, shard, transport, sign in zip((VISION, TEXT), shards, found.maps, (1.0, -1.0), strict=True):
            if transport.row_values is not None:  # the centred rows of all ranks are on the owner
                rows, center = torch.cat(shard.columns, dim=1).T, torch.zeros_like(shard.mean)
                of_rows = samples.of_all_ranks(modality).to(rows.device)
                found.sums[modality] = sum_over_samples(
                    rows, center, sign * difference, transport, of_rows, samples.num_samples, shard.count
                )
        peak.sample()
    return found


def _share_maps(layer: LayerRows, owner: int, solution: _Solution | None) -> list[TransportMap | None]:
    """The owner's maps, which ranks need for their own rows; None if the owner has all rows. Ranks: collective."""
    counts, dim = (layer.vision.count, layer.text.count), layer.vision.rows.shape[1]
    factors: list[Tensor | None] = [None, None]
    with distributed.fail_together():
        for modality in (VISION, TEXT):
            if counts[modality] < dim:
                continue  # the owner has all rows
            if solution is None:  # memory to receive the owner's
                factors[modality] = layer.vision.rows.new_empty(min(*counts, dim), dim, dtype=torch.float32)
            else:
                assert solution.maps is not None
                factor = solution.maps[modality].factor
                assert factor is not None
                factors[modality] = factor.contiguous()
    shared = [None if factor is None else distributed.copy_from_rank(factor, owner) for factor in factors]
    return [None if factor is None else TransportMap(factor=factor) for factor in shared]


def _add_rows(
    layer: LayerRows, means: tuple[Tensor, Tensor], maps: list[TransportMap | None], samples: SampleRows, sums: Tensor
) -> None:
    """Add the influence function of this rank's rows of a layer to ``sums``, (3, n). Ranks: any; no communication."""
    difference = means[VISION] - means[TEXT]
    of_rows = [samples.of_rank(distributed.rank(), modality).to(sums.device) for modality in (VISION, TEXT)]
    for modality, part, sign in ((VISION, layer.vision, 1.0), (TEXT, layer.text, -1.0)):
        mean, transport, mine = means[modality], maps[modality], of_rows[modality]
        if transport is not None:
            gap = sign * difference
            sums[modality] += sum_over_samples(part.rows, mean, gap, transport, mine, samples.num_samples, part.count)
    sums[2].index_add_(0, of_rows[TEXT], layer.text_norms)
