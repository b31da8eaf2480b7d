# SPDX-License-Identifier: Apache-2.0
"""From the rows of some layers to their distances: moments to each layer's owner, who solves; then standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mir_callback import distributed
from mir_callback.evaluation.memory import PeakMemory
from mir_callback.evaluation.token_statistics import TEXT, VISION, LayerRows, MomentShard, SampleRows, reduce_moments
from mir_callback.metric.coupling import Coupling
from mir_callback.metric.frechet import compute_companions, frechet_from_coupling, warn_if_clipped
from mir_callback.metric.influence import Map, SampleSums, compute_influences, compute_transport_maps, sum_over_samples
from mir_callback.watchdog import enter_phase


@dataclass(frozen=True)
class LayerResult:
    """What was found of a layer. The same on every rank."""

    distance: float
    companions: dict[str, float]
    influences: Tensor | None  # (n,) float64 on the CPU, of each sample on the distance; None if not asked for
    vision_outliers: int  # rows replaced
    text_outliers: int
    dtype: str  # of the rows


@dataclass
class _Solution:
    """What the owner of a layer found."""

    distance: float
    companions: dict[str, float]
    maps: tuple[Map, Map] | None = None
    sums: dict[int, Tensor] = field(default_factory=dict)  # the samples', of the modalities that it holds as a whole


def solve_layers(
    layers: Sequence[LayerRows], samples: SampleRows, first: int, root: str, errors: bool, bar: tqdm, peak: PeakMemory
) -> list[LayerResult]:
    """FD of every layer and, if asked for, with the exact root only, the influence of every sample on it.

    Layer k is solved by rank k mod W, one layer on each rank at a time. ``first`` is the index of the first of these
    layers in the model. Ranks: collective.
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
    """A layer on each rank: distance and companions of this one's, if it has any; adds to ``sums``, (W, 3, n)."""
    name, rank = f"layers {first + 1} to {first + len(group)}", distributed.rank()
    enter_phase(f"moments of {name}")
    means, own = [], None
    for owner, layer in enumerate(group):
        shards = reduce_moments(layer, owner)
        means.append((shards[VISION].mean, shards[TEXT].mean))
        own = shards if owner == rank else own
        del shards  # another's, before the next
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
            for layer, pair, forms, counted in zip(group, means, maps, sums, strict=True):
                _add_rows(layer, pair, forms, samples, counted)
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
    """A layer's distance, with what else its moments tell, by its owner."""
    norms = layer.vision_norm, 1.0 / layer.scale
    # One after the other, as each covariance is let go of once it is factored.
    coupling = Coupling(*[shard.take_moments(layer.scale) for shard in shards], maps_wanted=errors)
    result = frechet_from_coupling(coupling, root)
    warn_if_clipped(result, index + 1, root)
    peak.sample()
    found = _Solution(result.distance, compute_companions(coupling.vision, coupling.text, result.distance, *norms))
    if errors:
        found.maps = compute_transport_maps(coupling)
        gap = shards[VISION].mean - shards[TEXT].mean
        for modality, shard, form, sign in zip((VISION, TEXT), shards, found.maps, (1.0, -1.0), strict=True):
            if form.of_rows is not None:  # of the centred rows of all ranks, which are here
                rows, center = torch.cat(shard.columns, dim=1).T, torch.zeros_like(shard.mean)
                of_rows = samples.of_all_ranks(modality).to(rows.device)
                found.sums[modality] = sum_over_samples(
                    rows, center, sign * gap, form, of_rows, samples.num_samples, shard.count
                )
        peak.sample()
    return found


def _share_maps(layer: LayerRows, owner: int, solution: _Solution | None) -> list[Map | None]:
    """The owner's maps, which ranks need for their own rows; None where the owner has all rows. Collective."""
    counts, dim = (layer.vision.count, layer.text.count), layer.vision.rows.shape[1]
    roots: list[Tensor | None] = [None, None]
    with distributed.fail_together():
        for modality in (VISION, TEXT):
            if counts[modality] < dim:
                continue  # in factor form
            if solution is None:  # room for the owner's
                roots[modality] = layer.vision.rows.new_empty(min(*counts, dim), dim, dtype=torch.float32)
            else:
                assert solution.maps is not None
                root = solution.maps[modality].root
                assert root is not None
                roots[modality] = root.contiguous()
    return [None if root is None else Map(root=distributed.copy_from_rank(root, owner)) for root in roots]


def _add_rows(
    layer: LayerRows, means: tuple[Tensor, Tensor], maps: list[Map | None], samples: SampleRows, sums: Tensor
) -> None:
    """Add to (3, n) what this rank's rows of a layer count. Ranks: each for itself."""
    gap = means[VISION] - means[TEXT]
    of_rows = [samples.of_rank(distributed.rank(), modality).to(sums.device) for modality in (VISION, TEXT)]
    for modality, part, sign in ((VISION, layer.vision, 1.0), (TEXT, layer.text, -1.0)):
        mean, form, mine = means[modality], maps[modality], of_rows[modality]
        if form is not None:
            sums[modality] += sum_over_samples(part.rows, mean, sign * gap, form, mine, samples.num_samples, part.count)
    sums[2].index_add_(0, of_rows[TEXT], layer.text_norms)
