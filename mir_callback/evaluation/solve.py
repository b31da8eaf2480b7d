# SPDX-License-Identifier: Apache-2.0
"""From the rows of all layers to their distances: moments to each layer's owner, who solves; then standard errors.

Written as a generator that does all communication itself and hands out its heavy local work, so that the work can be
done at once or beside training, by the same lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mir_callback import distributed as collectives
from mir_callback.evaluation.token_statistics import TEXT, VISION, CloudParts, LayerClouds, SampleRows, share_parts
from mir_callback.evaluation.work import Steps
from mir_callback.metric.coupling import Factored, couple, factored
from mir_callback.metric.frechet import (
    Frechet,
    companions_of,
    frechet_from_coupling,
    frechet_from_moments,
    warn_if_clipped,
)
from mir_callback.metric.influence import Map, SampleSums, influences, sums_over_samples, transport_maps
from mir_callback.metric.moments import Moments
from mir_callback.watchdog import Tell


@dataclass(frozen=True)
class Distances:
    """What was found of every layer. The same on every rank.

    Attributes:
        per_layer: FD of each layer.
        companions: per layer, see `companions_of`.
        influences: (K, n) float64 on the CPU, of each sample on each FD; None if not asked for.
    """

    per_layer: list[float]
    companions: list[dict[str, float]]
    influences: Tensor | None


@dataclass(frozen=True)
class Solving:
    """How layers are solved.

    Attributes:
        root: "exact" or "paper_fast".
        errors: whether to find the samples' influences; with the exact root only.
        together: layers whose moments are held at a time, a multiple of the world size shares them out evenly.
        maps_together: layers whose transport maps are held at a time.
        first: index of the first of the layers in the model.
    """

    root: str
    errors: bool
    together: int
    maps_together: int
    first: int = 0


@dataclass(frozen=True)
class _Solution:
    """What the owner of a layer found; ``sums`` are the samples' of the clouds that it holds as a whole."""

    distance: float
    companions: dict[str, float]
    maps: tuple[Map, Map] | None = None
    sums: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Shared:
    """A layer's maps for rows that are spread over ranks, and on its owner the sums it has already."""

    maps: tuple[Map | None, Map | None]
    sums: dict[int, Tensor]


def distances(
    layers: Sequence[LayerClouds], samples: SampleRows, how: Solving, bar: tqdm, tell: Tell
) -> Steps[Distances]:
    """FD of every layer and, if asked for, the influence of every sample on it.

    Layer k is solved by rank k mod W.

    Ranks: collective; every driver does its rank's work, and a failure of it on one rank must become one of all.
    """
    device = layers[0].vision.rows.device
    sums = torch.zeros(len(layers), 3, samples.num_samples, dtype=torch.float64, device=device)
    found: dict[int, tuple[float, dict[str, float]]] = {}
    for group in _groups(range(len(layers)), how.together):
        named = f"layers {how.first + group[0] + 1} to {how.first + group[-1] + 1}"
        tell(f"moments of {named}")
        means, owned = {}, {}
        for index in group:
            parts = share_parts(layers[index], owner=_owner(index))
            means[index] = parts[0].mean, parts[1].mean
            if _owner(index) == collectives.rank():
                owned[index] = parts
            del parts
        tell(f"distances of {named}")
        solved: dict[int, _Solution] = yield partial(_solve_all, owned, layers, samples, how)
        found |= {index: (solution.distance, solution.companions) for index, solution in solved.items()}
        bar.update(len(group))
        for inner in _groups(group, how.maps_together) if how.errors else ():
            tell(f"standard errors of {named}")
            shared = {index: _share_maps(layers[index], _owner(index), solved.pop(index, None)) for index in inner}
            yield partial(_add_all, sums, shared, means, layers, samples)
    everyone = {index: value for part in collectives.gather_objects(found) for index, value in part.items()}
    per_layer, companions = zip(*(everyone[index] for index in range(len(layers))), strict=True)
    found_influences = None
    if how.errors:
        found_influences = _influences(collectives.sum_over_ranks(sums).cpu(), layers, samples, per_layer)
    return Distances(list(per_layer), list(companions), found_influences)


def joined(parts: Sequence[Distances]) -> Distances:
    """What was found of several ranges of layers, in their order. Ranks: pure."""
    influences_of = [part.influences for part in parts if part.influences is not None]
    return Distances(
        per_layer=[distance for part in parts for distance in part.per_layer],
        companions=[layer for part in parts for layer in part.companions],
        influences=torch.cat(influences_of) if influences_of else None,
    )


def _groups(indices: Sequence[int], size: int) -> list[Sequence[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _owner(index: int) -> int:
    return index % collectives.world_size()


def _solve_all(
    owned: dict[int, tuple[CloudParts, CloudParts]], layers: Sequence[LayerClouds], samples: SampleRows, how: Solving
) -> dict[int, _Solution]:
    """Solve this rank's layers one by one, and let go of the moments of each. Ranks: each for itself."""
    return {index: _solve(index, owned.pop(index), layers[index], samples, how) for index in list(owned)}


def _solve(
    index: int, parts: tuple[CloudParts, CloudParts], layer: LayerClouds, samples: SampleRows, how: Solving
) -> _Solution:
    if how.root != "exact":
        vision, text = (part.take_moments(layer.scale) for part in parts)
        return _solution(index, vision, text, frechet_from_moments(vision, text, how.root), layer, how)
    # One after the other, as each covariance is let go of once it is factored.
    coupling = couple(*[factored(part.take_moments(layer.scale)) for part in parts])
    if how.errors and not coupling.on_gpu:
        coupling.find_vectors()  # first, as the distance then comes from the same solve
    found = _solution(index, coupling.vision, coupling.text, frechet_from_coupling(coupling), layer, how)
    if not how.errors:
        return found
    maps = transport_maps(coupling)
    gap = parts[0].mean - parts[1].mean
    sums = {
        modality: _sums_of_columns(part, sign * gap, form, samples, modality)
        for modality, part, sign, form in zip((VISION, TEXT), parts, (1.0, -1.0), maps, strict=True)
        if form.of_rows is not None
    }
    return replace(found, maps=maps, sums=sums)


def _solution(
    index: int, vision: Moments | Factored, text: Moments | Factored, result: Frechet, layer: LayerClouds, how: Solving
) -> _Solution:
    """A layer's distance, with what else its moments tell."""
    warn_if_clipped(result, how.first + index + 1, how.root)
    companions = companions_of(vision, text, result.distance, layer.vision_norm, 1.0 / layer.scale)
    return _Solution(result.distance, companions)


def _sums_of_columns(part: CloudParts, gap: Tensor, form: Map, samples: SampleRows, modality: int) -> Tensor:
    """What each sample counts, from the centred rows of all ranks."""
    rows = torch.cat(part.columns, dim=1).T
    of_rows = samples.of_all_ranks(modality).to(rows.device)
    return sums_over_samples(rows, torch.zeros_like(part.mean), gap, form, of_rows, samples.num_samples, part.count)


def _share_maps(layer: LayerClouds, owner: int, solution: _Solution | None) -> _Shared:
    """The maps that ranks need for their own rows, and on the owner the sums that it has already. Collective."""
    with collectives.all_or_none():
        roots = [_root(layer, modality, solution) for modality in (VISION, TEXT)]
    vision, text = (None if root is None else Map(root=collectives.copy_from_rank(root, owner)) for root in roots)
    return _Shared((vision, text), {} if solution is None else solution.sums)


def _root(layer: LayerClouds, modality: int, solution: _Solution | None) -> Tensor | None:
    """The owner's root, elsewhere room for it; None for a cloud in factor form, which the owner has whole."""
    dim = layer.vision.rows.shape[1]
    counts = layer.vision.count, layer.text.count
    if counts[modality] < dim:
        return None
    if solution is None:
        return layer.vision.rows.new_empty(min(*counts, dim), dim, dtype=torch.float32)
    assert solution.maps is not None
    root = solution.maps[modality].root
    assert root is not None
    return root.contiguous()


def _add_all(
    sums: Tensor,
    shared: dict[int, _Shared],
    means: dict[int, tuple[Tensor, Tensor]],
    layers: Sequence[LayerClouds],
    samples: SampleRows,
) -> None:
    """Add to (K, 3, n) what this rank's rows count. Ranks: each for itself."""
    of_rows = [samples.of_rank(collectives.rank(), modality).to(sums.device) for modality in (VISION, TEXT)]
    for index in list(shared):
        solved = shared.pop(index)
        layer, gap = layers[index], means[index][0] - means[index][1]
        for modality, cloud, sign in ((VISION, layer.vision, 1.0), (TEXT, layer.text, -1.0)):
            form, mean, mine = solved.maps[modality], means[index][modality], of_rows[modality]
            if form is not None:
                sums[index, modality] += sums_over_samples(
                    cloud.rows, mean, sign * gap, form, mine, samples.num_samples, cloud.count
                )
        for modality, ready in solved.sums.items():
            sums[index, modality] += ready
        sums[index, 2].index_add_(0, of_rows[TEXT], layer.text_norms)


def _influences(sums: Tensor, layers: Sequence[LayerClouds], samples: SampleRows, per_layer: Sequence[float]) -> Tensor:
    """Influence of every sample on every layer, (K, n), from the sums over all ranks (K, 3, n). Ranks: pure."""
    rows = samples.totals(VISION), samples.totals(TEXT)
    return torch.stack(
        [
            influences(SampleSums(summed[VISION], summed[TEXT], summed[2], *rows), distance, layer.scale)
            for summed, layer, distance in zip(sums, layers, per_layer, strict=True)
        ]
    )
