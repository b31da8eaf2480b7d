# SPDX-License-Identifier: Apache-2.0
"""How much each sample of a probe moves a Frechet distance, to first order: the source of its standard error.

A token is no independent draw: those of one image or one text go together, so that the sampling unit is the sample.
With D = mu_v - mu_t, the slopes of FD with respect to the covariances are I - A_v and I - A_t, where A_v and A_t are
the optimal transport maps between the two Gaussians. So a vision row x, with c = x - mu_v, counts

    2 D.c + N/(N-1) (|c|^2 - c^T A_v c)

more or less than the mean over all N rows; a text row the same with -D, c = x - mu_t and A_t; and the text norms move
the scale that both are measured in. The influence of a sample is the sum over its rows, times the number of samples
over the number of rows.

From any factor S_v = F^T F and M = F S_t F^T = V L V^T, the maps are A_v = F^-1 M^(1/2) F^-T and A_t = F^T M^(-1/2) F.
With Q the polar factor of A B^T for Cholesky's factors A and B, they are B^T Q^T A^-T and A^T Q B^-T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mir_callback.metric.coupling import Coupling
from mir_callback.metric.tokens import iterate_in_float64

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Map:
    """The quadratic form c^T A c of one modality's optimal transport map for its rows, in one of two forms."""

    # (r, d) float32 with A = root^T root, r the smaller of d and the fewest rows of a modality.
    root: Tensor | None = None
    of_rows: Tensor | None = None  # (n,) float64, the form at each of the rows of a cloud in factor form


@dataclass(frozen=True)
class SampleSums:
    """What the n samples of a probe count in one layer, summed over ranks."""

    vision: Tensor  # (n,) float64, `sum_over_samples` of the vision rows
    text: Tensor  # the same of the text rows
    text_norms: Tensor  # (n,) float64, sums of the raw norms of the text rows
    vision_rows: Tensor  # (n,) int64, how many rows each sample has
    text_rows: Tensor


def compute_mir_influences(per_layer: Tensor, distances: list[float]) -> Tensor:
    """Influence of each sample on MIR, (n,) float64 in log10 units, from those on the layers (K, n). Ranks: pure."""
    return per_layer.sum(dim=0) / (math.log(10.0) * math.fsum(distances))


def compute_standard_error(influences: Tensor) -> Tensor:
    """Standard error of what a probe measures, from its samples' influences, the last dimension. Ranks: pure."""
    return (influences.var(dim=-1) / influences.shape[-1]).sqrt()


def compute_influences(sums: SampleSums, distance: float, scale: float) -> Tensor:
    """First-order influence of each sample on the distance of a layer, (n,) float64, which add up to zero. Ranks: pure.

    The sums are of raw rows, the distance is of those times ``scale``.
    """
    parts = (
        (scale**2 * sums.vision, sums.vision_rows),
        (scale**2 * sums.text, sums.text_rows),
        # FD is homogeneous of degree two in the scale, which is one over the mean norm.
        (-2.0 * distance * scale * sums.text_norms, sums.text_rows),
    )
    found = torch.zeros_like(sums.vision)
    for summed, counts in parts:
        rows = counts.to(summed.dtype)  # a number over an integer tensor would be of torch's default dtype, float32
        total = rows.sum()
        found += len(rows) / total * (summed - rows * (summed.sum() / total))
    return found


def sum_over_samples(
    rows: Tensor, mean: Tensor, gap: Tensor, form: Map, samples: Tensor, count: int, total: int
) -> Tensor:
    """What rows (n, d) of each sample count together in FD, up to a constant a row: see the head of this file.

    Args:
        rows: outliers replaced; centred rows will do, with a mean of zero.
        mean: (d,) float64, of all rows of this modality.
        gap: (d,) float64, mean of this modality minus that of the other.
        form: the transport map of this modality; ``of_rows`` belongs to these very rows.
        samples: (n,) int64, sample of each row.
        count: number of samples of the probe, as many sums come back, float64.
        total: rows of this modality on all ranks.

    Ranks: pure; the results of the ranks add up.
    """
    bessel = total / (total - 1)  # of the sample covariances
    slopes = []
    for chunk in iterate_in_float64(rows):
        centred = chunk - mean
        spread = centred.square().sum(dim=1)
        if form.root is not None:
            # float32 is plenty for an error estimate; the centring is not left to it.
            spread -= (centred.float() @ form.root.T).square().sum(dim=1, dtype=torch.float64)
        slopes.append(2.0 * (centred @ gap) + bessel * spread)
    every = torch.cat(slopes)
    if form.of_rows is not None:
        every -= bessel * form.of_rows
    return every.new_zeros(count).index_add_(0, samples, every)


def compute_transport_maps(coupling: Coupling) -> tuple[Map, Map]:
    """The maps A_v and A_t of vision and text; scaling both clouds alike does not change them.

    Directions in which the two clouds together have less variance than rounding are left out. Ranks: pure.
    """
    maps = compute_maps_by_polar_factor(coupling) if coupling.on_gpu else None  # eigenvectors take longest there
    first, second = maps or _compute_maps_by_eigenvectors(coupling)
    return (second, first) if coupling.turned else (first, second)


def compute_maps_by_polar_factor(coupling: Coupling) -> tuple[Map, Map] | None:
    """Maps of the coupling's first and second cloud; None if Cholesky's factors are lacking. Ranks: pure."""
    if not coupling.vision.kind == coupling.text.kind == "triangle" or coupling.polar is None:
        return None
    near = coupling.polar.near
    polar = (near @ (near.T @ near)).mul_(-0.5).add_(near, alpha=1.5)
    maps = []
    first, second = coupling.first.factor, coupling.second.factor
    for own, other, turn in ((first, second, polar.T), (second, first, polar)):
        form = other.T @ turn
        torch.linalg.solve_triangular(own.T, form, upper=False, left=False, out=form)
        form = form.add(form.T).mul_(0.5)
        lower, failed = torch.linalg.cholesky_ex(form)
        if failed.item():
            return None
        maps.append(Map(root=lower.T.float()))
        del form, lower  # which would outlive the next product
    return maps[0], maps[1]


def _compute_maps_by_eigenvectors(coupling: Coupling) -> tuple[Map, Map]:
    first, second = coupling.first, coupling.second
    values, vectors = coupling.spectrum
    fourth = values.clamp_min(0.0).pow(0.25)
    known = values > 8.0 * _EPS * first.size * second.size
    inverse_fourth = torch.where(known, values.clamp_min(1e-300).pow(-0.25), 0.0)
    if second.kind == "rows":
        forms = (vectors.T @ coupling.cross()).mul_(inverse_fourth[:, None]).square_().sum(dim=0)
        second_map = Map(of_rows=(second.count - 1) * forms)
    else:
        second_map = Map(root=_fill((vectors.T @ first.factor).mul_(inverse_fourth[:, None]), coupling))
    if first.kind == "rows":
        return Map(of_rows=(first.count - 1) * (vectors * fourth).square_().sum(dim=1)), second_map
    if first.kind == "triangle":
        solved = torch.linalg.solve_triangular(first.factor, vectors, upper=True)
    else:  # the pseudo inverse of the eigenvectors
        solved = first.factor.T @ (vectors / first.factor.square().sum(dim=1)[:, None])
    return Map(root=_fill(solved.mul_(fourth).T, coupling)), second_map


def _fill(root: Tensor, coupling: Coupling) -> Tensor:
    """``root`` with rows of zeros up to the number that follows from the clouds' sizes alone, in float32."""
    missing = min(coupling.vision.count, coupling.text.count, root.shape[1]) - root.shape[0]
    return torch.nn.functional.pad(root, (0, 0, 0, missing)).float()
