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
from mir_callback.metric.bootstrap import BINS, draw_weights
from mir_callback.metric.frechet import compute_companions, frechet_from_moments, warn_if_clipped
from mir_callback.metric.influence import (
    SampleSums,
    TransportMap,
    compute_influences,
    compute_row_influences,
    compute_transport_maps,
)
from mir_callback.metric.matrix_sqrt import GaussianPair
from mir_callback.watchdog import enter_phase

_NEARLY_EQUAL = 1e-4  # covariance part over traces


@dataclass(frozen=True)
class LayerResult:
    """The results of a layer. The same on every rank."""

    distance: float
    companions: dict[str, float]
    influences: Tensor | None  # (n,) float64 on the CPU, of each sample on the distance; None without standard errors
    draws: Tensor | None  # (2, DRAWS), change on each draw of the samples, without and with outliers found anew
    vision_outliers: int  # number of rows replaced
    text_outliers: int
    dtype: str  # of the rows


@dataclass
class _Solution:
    """The results of a layer on its owner rank."""

    distance: float
    companions: dict[str, float]
    maps: tuple[TransportMap, TransportMap] | None = None
    map_dtype: torch.dtype = torch.float32
    sums: dict[int, Tensor] = field(default_factory=dict)  # over samples, of modalities whose rows it has gathered


def solve_layers(
    layers: Sequence[LayerRows], samples: SampleRows, first: int, root: str, errors: bool, bar: tqdm, peak: PeakMemory
) -> list[LayerResult]:
    """Distance of every layer and, with ``errors`` and root "exact", the influence of every sample on it.

    Layer k is solved by rank k mod world_size, one layer on each rank at a time. ``first`` is the index of the first of
    these layers in the model. Ranks: collective.
    """
    world, rank, device = distributed.world_size(), distributed.rank(), layers[0].vision.rows.device
    count = samples.num_samples
    sums = torch.zeros(len(layers), 3 + 4 * BINS, count, dtype=torch.float64, device=device) if errors else None
    solved: dict[int, tuple[float, dict[str, float]]] = {}
    for start in range(0, len(layers), world):
        group = layers[start : start + world]
        group_sums = None if sums is None else sums[start : start + world]
        solution = _solve_group(group, samples, first + start, root, group_sums, peak)
        if solution is not None:
            solved[start + rank] = solution
        bar.update(len(group))
    everyone = {index: found for part in distributed.gather_objects(solved) for index, found in part.items()}
    if sums is not None:
        sums = distributed.sum_over_ranks(sums).cpu()
    results = []
    for index, layer in enumerate(layers):
        distance, companions = everyone[index]
        influences, draws = (None, None) if sums is None else _find_influences(sums[index], layer, samples, distance)
        dtype = str(layer.vision.rows.dtype).removeprefix("torch.")
        replaced = layer.vision.replaced, layer.text.replaced
        results.append(LayerResult(distance, companions, influences, draws, *replaced, dtype))
    return results


def _find_influences(sums: Tensor, layer: LayerRows, samples: SampleRows, distance: float) -> tuple[Tensor, Tensor]:
    """Influences and draws of a :class:`LayerResult`, from the sums of all ranks, (3 + 4 BINS, n)."""
    rows = samples.totals(VISION), samples.totals(TEXT)
    vision, text, norms = sums[:3]
    influences = compute_influences(SampleSums(vision, text, norms, *rows), distance)
    fixed = draw_weights(samples.num_samples) @ influences / samples.num_samples
    anew = fixed.clone()
    for part, table in zip((layer.vision, layer.text), sums[3:].unflatten(0, (2, 2, BINS)), strict=True):
        assert part.resampled is not None
        anew += part.resampled.effects(table) / part.count
    return influences, torch.stack([fixed, anew])


def _solve_group(
    group: Sequence[LayerRows], samples: SampleRows, first: int, root: str, sums: Tensor | None, peak: PeakMemory
) -> tuple[float, dict[str, float]] | None:
    """Solve one layer on each rank: distance and companions of this rank's, if any; adds to ``sums`` (W, ...)."""
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
        dtypes = distributed.gather_objects(solution.map_dtype if solution else None)
        maps = [
            _share_maps(layer, owner, solution if owner == rank else None, dtype)
            for owner, (layer, dtype) in enumerate(zip(group, dtypes, strict=False))
        ]
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
    found = _Solution(result.distance, compute_companions(pair, root, result.distance, *norms))
    if errors:
        # Of clouds this near only the difference between |c|^2 and c^T A c is left.
        if found.companions["covariance_part"] < _NEARLY_EQUAL * (pair.vision.trace + pair.text.trace).item():
            found.map_dtype = torch.float64
        found.maps = compute_transport_maps(pair, found.map_dtype)
        difference = shards[VISION].mean - shards[TEXT].mean
        for modality, shard, transport, sign in zip((VISION, TEXT), shards, found.maps, (1.0, -1.0), strict=True):
            if transport.row_values is not None:  # the centred rows of all ranks are on the owner
                rows, center = torch.cat(shard.columns, dim=1).T, torch.zeros_like(shard.mean)
                values = compute_row_influences(rows, center, sign * difference, transport, shard.count, layer.scale)
                of_rows = samples.of_all_ranks(modality).to(rows.device)
                found.sums[modality] = values.new_zeros(samples.num_samples).index_add_(0, of_rows, values)
        peak.sample()
    return found


def _share_maps(
    layer: LayerRows, owner: int, solution: _Solution | None, dtype: torch.dtype | None
) -> tuple[TransportMap, TransportMap]:
    """The factors of the owner's maps, which ranks need for their own rows. Ranks: collective."""
    counts, dim = (layer.vision.count, layer.text.count), layer.vision.rows.shape[1]
    factors: list[Tensor] = []
    with distributed.fail_together():
        for modality in (VISION, TEXT):
            if solution is not None:
                assert solution.maps is not None
                factors.append(solution.maps[modality].factor.contiguous())
            else:  # memory to receive the owner's
                shape = (1,) if counts[modality] < dim else (min(*counts, dim), dim)
                factors.append(layer.vision.rows.new_empty(shape, dtype=dtype))
    vision, text = (TransportMap(factor=distributed.copy_from_rank(factor, owner)) for factor in factors)
    return vision, text


def _add_rows(
    layer: LayerRows,
    means: tuple[Tensor, Tensor],
    maps: tuple[TransportMap, TransportMap],
    samples: SampleRows,
    sums: Tensor,
) -> None:
    """Add the influence functions of this rank's rows of a layer to ``sums``, (3 + 4 BINS, n).

    By sample, and those of rows that some draw of the samples decides otherwise also by norm. Ranks: any; no
    communication.
    """
    difference, count = means[VISION] - means[TEXT], samples.num_samples
    tables = sums[3:].unflatten(0, (2, 2, BINS))
    for modality, part, sign in ((VISION, layer.vision, 1.0), (TEXT, layer.text, -1.0)):
        assert part.resampled is not None
        of_rows = samples.of_rank(distributed.rank(), modality).to(sums.device)
        known = means[modality], sign * difference, maps[modality], part.count, layer.scale
        values = compute_row_influences(part.rows, *known)
        if maps[modality].factor.ndim == 2:  # else the owner has all rows, and adds their precise values
            sums[modality].index_add_(0, of_rows, values)
        undecided = part.resampled.undecided(part.norms)
        spared = part.outliers & undecided
        values[spared] = compute_row_influences(part.spared, *known) - values[spared]
        chosen = part.norms[undecided], values[undecided], of_rows[undecided]
        tables[modality] += part.resampled.tabulate(*chosen, count)
        if modality == TEXT:
            sums[2].index_add_(0, of_rows, layer.scale * part.norms)
