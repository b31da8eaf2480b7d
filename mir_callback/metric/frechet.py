# SPDX-License-Identifier: Apache-2.0
"""Frechet distance of two clouds of token rows, and what else their moments tell of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mir_callback.errors import ConfigError, NumericsError
from mir_callback.metric.coupling import Coupling, compute_covariance_part
from mir_callback.metric.moments import Moments, compute_moments, require_finite

Root = Literal["exact", "paper_fast"]
ROOTS: tuple[str, ...] = get_args(Root)
# Names of the values of compute_companions, as reports and logs have them.
COMPANIONS = ("mean_part", "covariance_part", "norm_ratio", "cosine", "vision_rank", "text_rank")

_EPS = torch.finfo(torch.float64).eps

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frechet:
    """A Frechet distance and how far to trust it."""

    distance: float  # FD >= 0; rounding below zero, and anything smaller than `rounding`, is 0
    raw: float  # the value before clipping
    rounding: float  # generous estimate of the rounding error of `raw`, from the sizes of means and covariances

    @property
    def clipped(self) -> bool:
        """Whether more than rounding was clipped away: never with the exact root, possible with ``paper_fast``."""
        return self.raw < -self.rounding


def frechet_distance(vision: Tensor, text: Tensor) -> float:
    """Squared Frechet distance between the Gaussians fitted to two row matrices, as they are.

    No scaling and no outlier rule; for the rate built on it see :func:`modality_integration_rate`.

    Args:
        vision: (N_v, d), any floating dtype, N_v >= 2.
        text: (N_t, d), any floating dtype, N_t >= 2, same device.

    Returns:
        Float >= 0, in squared units of the rows.

    Raises:
        NumericsError: wrong shape or dtype, fewer than two rows, or values that are not finite.

    Ranks: pure.
    Source: arXiv:2410.07167, section 3; sample covariances, square root in float64.

    Example:
        >>> rows = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 0.0]])
        >>> frechet_distance(rows + 3.0, rows)  # a move of 3 in each of two dimensions
        18.0
    """
    check_rows(vision, text)
    return frechet_from_coupling(Coupling(compute_moments(vision), compute_moments(text))).distance


def frechet_from_coupling(coupling: Coupling, root: str = "exact") -> Frechet:
    """Frechet distance of two clouds given by their moments, unitless for a mean text norm of one. Ranks: pure.

    Raises ConfigError for an unknown root, and NumericsError if the means are too far apart for float64.
    Source: arXiv:2410.07167, equation of FD in section 3.
    """
    check_root(root)
    vision, text = coupling.vision, coupling.text
    gap = (vision.mean - text.mean).square().sum().item()
    require_finite(gap)
    if root == "exact":
        part, error = compute_covariance_part(coupling, gap)
    else:
        traces, sizes = (vision.trace + text.trace).item(), (vision.size * text.size).item()
        part = traces - 2.0 * coupling.cross().square().sum().item()  # tr(S_v S_t) = ||A B^T||^2
        error = 16.0 * _EPS * (gap + traces + len(coupling.first.factor) * sizes)
    # The means themselves are rounded, which counts where large ones are all but equal.
    off = 8.0 * _EPS * (vision.mean.norm() + text.mean.norm()).item()
    raw, rounding = gap + part, error + 2.0 * gap**0.5 * off + off**2
    return Frechet(distance=raw if raw > rounding else 0.0, raw=raw, rounding=rounding)


def compute_companions(
    vision: Moments, text: Moments, distance: float, vision_norm: float, text_norm: float
) -> dict[str, float]:
    """What else the moments of a layer tell, at next to no cost: why its distance is what it is. Ranks: pure.

    By the names in COMPANIONS: the part of FD that the means' gap makes, and the rest, which the covariances make; the
    ratio of the mean norms, of raw rows with their outliers; the cosine between the two means; the effective rank
    (tr S)^2 / tr S^2 of each covariance, between 1 and d, 0 for rows that are all alike.
    """
    mean_part = (vision.mean - text.mean).square().sum().item()
    lengths = (vision.mean.norm() * text.mean.norm()).item()
    ranks = [(each.trace / each.size).item() ** 2 if each.size > 0.0 else 0.0 for each in (vision, text)]
    cosine = (vision.mean @ text.mean).item() / lengths if lengths > 0.0 else 0.0
    values = (mean_part, distance - mean_part, vision_norm / text_norm, cosine, *ranks)
    return dict(zip(COMPANIONS, values, strict=True))


def check_root(root: str) -> None:
    """Raise ConfigError unless ``root`` is one of ROOTS. Ranks: pure."""
    if root not in ROOTS:
        raise ConfigError(f"root must be one of {', '.join(ROOTS)}, got {root!r}; use root='exact' for the paper's MIR")


def check_rows(vision: Tensor, text: Tensor, where: str = "") -> None:
    """Raise NumericsError unless both are finite floating (N >= 2, d) matrices of one d. Ranks: pure."""
    for name, rows in ((f"{where}vision", vision), (f"{where}text", text)):
        if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.is_floating_point():
            given = f"{rows.dtype} tensor {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise NumericsError(f"{name} is a {given}; token rows come stacked, as one floating (N, d) tensor")
        if len(rows) < 2:
            raise NumericsError(
                f"{name} has {len(rows)} rows, too few for a sample covariance; use more samples or longer texts"
            )
        bad = int((~torch.isfinite(rows)).any(dim=1).sum())
        if bad:
            raise NumericsError(
                f"{name} holds NaN or infinity in {bad} of {len(rows)} rows; "
                "look for divergence or an overflow of the training dtype"
            )
    if vision.shape[1] != text.shape[1]:
        raise NumericsError(
            f"{where}vision rows are {vision.shape[1]} wide and text rows {text.shape[1]}; "
            "take both from the same decoder layer"
        )


def warn_if_clipped(result: Frechet, layer: int, root: str) -> None:
    """Say aloud that a layer's distance was clipped at zero by more than rounding. Ranks: pure."""
    if result.clipped:
        log.warning(
            "layer %d: root=%r gave a distance of %.3e, clipped to 0; it lies below zero by more than rounding (%.1e), "
            "as 'paper_fast' can for strongly correlated clouds",
            *(layer, root, result.raw, result.rounding),
        )
