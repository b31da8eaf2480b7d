# SPDX-License-Identifier: Apache-2.0
"""Influence of each probe sample on a Frechet distance, to first order; standard errors follow from it.

Tokens of one image or one text are not independent, so the unit of sampling is the sample, not the token. With
D = mu_v - mu_t, the gradients of FD with respect to the covariances are I - A_v and I - A_t, where A_v and A_t are the
optimal transport maps between the two Gaussians. The influence function of a vision row x, with c = x - mu_v, is

    2 D.c + N/(N-1) (|c|^2 - c^T A_v c)

minus its mean over all N rows; for a text row the same with -D, c = x - mu_t and A_t. In addition the text norms change
the scale of both modalities. The influence of a sample is the sum over its rows, times the number of samples divided
by the number of rows.

From any factor S_v = F^T F and M = F S_t F^T = V L V^T, the maps are A_v = F^-1 M^(1/2) F^-T and A_t = F^T M^(-1/2) F.
With Q the polar factor of A B^T for Cholesky factors A and B, they are B^T Q^T A^-T and A^T Q B^-T.

Which rows the 3-sigma rule replaces is taken as given here; see metric/bootstrap.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mir_callback.metric.matrix_sqrt import GaussianPair
from mir_callback.metric.moments import Moments
from mir_callback.metric.tokens import iterate_in_float64

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class TransportMap:
    """The optimal transport map A of one modality.

    Attributes:
        factor: (r, d) with A = factor^T factor, where r is the smaller of d and the smaller number of rows. For fewer
            rows than dimensions (1,), with A near factor^2 I: c^T A c has the right mean over the rows.
        row_values: for fewer rows than dimensions (n,) float64, c^T A c at each scaled and centred row.
    """

    factor: Tensor
    row_values: Tensor | None = None


@dataclass(frozen=True)
class SampleSums:
    """Sums over the rows of each of the n samples of a probe, in one layer, over all ranks."""

    vision: Tensor  # (n,) float64, of `compute_row_influences` of the vision rows
    text: Tensor  # the same of the text rows
    text_norms: Tensor  # (n,) float64, of the scaled norms of the text rows
    vision_rows: Tensor  # (n,) int64, number of rows of each sample
    text_rows: Tensor


def compute_mir_influences(per_layer: Tensor, distances: list[float]) -> Tensor:
    """Influence of each sample on MIR, (n,) float64, from the influences on the K layers, (K, n). Ranks: pure."""
    return per_layer.sum(dim=0) / (math.log(10.0) * math.fsum(distances))


def compute_standard_error(influences: Tensor) -> Tensor:
    """Standard error of an estimate from the influences of the samples, (..., n). Ranks: pure."""
    return (influences.var(dim=-1) / influences.shape[-1]).sqrt()


def compute_influences(sums: SampleSums, distance: float) -> Tensor:
    """First-order influence of each sample on the distance of a layer, (n,) float64 with sum zero. Ranks: pure."""
    parts = (
        (sums.vision, sums.vision_rows),
        (sums.text, sums.text_rows),
        # FD is proportional to the square of the scale, which is one over the mean norm.
        (-2.0 * distance * sums.text_norms, sums.text_rows),
    )
    found = torch.zeros_like(sums.vision)
    for summed, counts in parts:
        rows = counts.to(summed.dtype)  # division by an integer tensor would give float32, torch's default dtype
        total = rows.sum()
        found += len(rows) / total * (summed - rows * (summed.sum() / total))
    return found


def compute_row_influences(
    rows: Tensor, mean: Tensor, difference: Tensor, transport: TransportMap, total: int, scale: float
) -> Tensor:
    """Influence function of FD at each row, up to a constant; see the module docstring.

    Args:
        rows: (n, d) raw, outliers replaced or not; or centred rows, with a mean of zero.
        mean: (d,) float64, of all rows of this modality, outliers replaced.
        difference: (d,) float64, mean of this modality minus mean of the other.
        transport: the transport map of this modality; its ``row_values``, if any, are of these rows.
        total: number of rows of this modality on all ranks.
        scale: the text-centric scale. Rows are scaled first, so that squares of tiny or huge ones stay finite.

    Returns:
        (n,) float64.

    Ranks: pure.
    """
    factor, bessel = transport.factor, total / (total - 1)  # for sample covariances
    found = []
    for chunk in iterate_in_float64(rows):
        centred = (chunk - mean) * scale
        values = centred @ (2.0 * scale * difference)
        spread = centred.square().sum(dim=1)
        if transport.row_values is None:
            narrow = centred.to(factor.dtype)
            mapped = narrow @ factor.T if factor.ndim == 2 else narrow * factor
            spread -= mapped.square().sum(dim=1, dtype=torch.float64)
        found.append(values + bessel * spread)
    every = torch.cat(found)
    return every if transport.row_values is None else every - bessel * transport.row_values


def compute_transport_maps(pair: GaussianPair, dtype: torch.dtype = torch.float32) -> tuple[TransportMap, TransportMap]:
    """The optimal transport maps A_v and A_t of vision and text, with factors of this dtype. Ranks: pure.

    Scaling both modalities by the same factor does not change them. Directions in which the variances are below
    rounding are left out. float32 is enough for an error estimate unless the clouds are nearly equal: then |c|^2 and
    c^T A c cancel.
    """
    maps = compute_maps_by_polar_factor(pair, dtype) if pair.on_gpu else None  # eigenvectors are slow there
    first, second = maps or _compute_maps_by_eigenvectors(pair, dtype)
    return (second, first) if pair.swapped else (first, second)


def compute_maps_by_polar_factor(
    pair: GaussianPair, dtype: torch.dtype = torch.float32
) -> tuple[TransportMap, TransportMap] | None:
    """Maps of the pair's first and second Gaussian; None without Cholesky factors or polar factor. Ranks: pure."""
    if not pair.vision.kind == pair.text.kind == "triangle" or pair.polar is None:
        return None
    approximate = pair.polar.factor
    polar = (approximate @ (approximate.T @ approximate)).mul_(-0.5).add_(approximate, alpha=1.5)
    maps = []
    first, second = pair.first.factor, pair.second.factor
    for own, other, turn in ((first, second, polar.T), (second, first, polar)):
        form = other.T @ turn
        torch.linalg.solve_triangular(own.T, form, upper=False, left=False, out=form)
        form = form.add(form.T).mul_(0.5)
        lower, failed = torch.linalg.cholesky_ex(form)
        if failed.item():
            return None
        maps.append(TransportMap(factor=lower.T.to(dtype)))
        del form, lower  # before the next product takes memory
    return maps[0], maps[1]


def _compute_maps_by_eigenvectors(pair: GaussianPair, dtype: torch.dtype) -> tuple[TransportMap, TransportMap]:
    first, second = pair.first, pair.second
    values, vectors = pair.spectrum
    fourth = values.clamp_min(0.0).pow(0.25)
    known = values > 8.0 * _EPS * first.frobenius_norm * second.frobenius_norm
    inverse_fourth = torch.where(known, values.clamp_min(1e-300).pow(-0.25), 0.0)
    if second.kind == "rows":
        forms = (vectors.T @ pair.cross()).mul_(inverse_fourth[:, None]).square_().sum(dim=0)
        second_map = _map_at_rows(second, forms, dtype)
    else:
        factor = (vectors.T @ first.factor).mul_(inverse_fourth[:, None])
        second_map = TransportMap(factor=_pad_rows(factor, pair, dtype))
    if first.kind == "rows":
        return _map_at_rows(first, (vectors * fourth).square_().sum(dim=1), dtype), second_map
    if first.kind == "triangle":
        solved = torch.linalg.solve_triangular(first.factor, vectors, upper=True)
    else:  # the pseudo-inverse
        solved = first.factor.T @ (vectors / first.factor.square().sum(dim=1)[:, None])
    return TransportMap(factor=_pad_rows(solved.mul_(fourth).T, pair, dtype)), second_map


def _map_at_rows(moments: Moments, forms: Tensor, dtype: torch.dtype) -> TransportMap:
    """From c^T A c at the rows of the factor of these moments, (n,)."""
    multiple = forms.sum() / moments.trace.clamp_min(1e-300)
    return TransportMap(factor=multiple.sqrt().reshape(1).to(dtype), row_values=(moments.count - 1) * forms)


def _pad_rows(factor: Tensor, pair: GaussianPair, dtype: torch.dtype) -> Tensor:
    """``factor`` with zero rows up to the number that every rank can compute from the counts alone."""
    missing = min(pair.vision.count, pair.text.count, factor.shape[1]) - factor.shape[0]
    return torch.nn.functional.pad(factor, (0, 0, 0, missing)).to(dtype)
