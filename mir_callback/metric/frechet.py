# SPDX-License-Identifier: Apache-2.0
"""Frechet distance between the Gaussians fitted to two sets of token rows, and its components."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mir_callback.errors import ConfigError, NumericsError
from mir_callback.metric.matrix_sqrt import GaussianPair, compute_covariance_part
from mir_callback.metric.moments import compute_moments, require_finite

Root = Literal["exact", "paper_fast"]
ROOTS: tuple[str, ...] = get_args(Root)
# Names of the values of compute_companions in reports and logs.
COMPANIONS = ("mean_part", "covariance_part", "norm_ratio", "cosine", "vision_rank", "text_rank", "scale_free")

_EPS = torch.finfo(torch.float64).eps

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrechetResult:
    """A squared Frechet distance and an estimate of its rounding error."""

    distance: float  # FD >= 0; 0 if `raw` is negative or smaller than `rounding`
    raw: float  # the value before clipping
    rounding: float  # upper estimate of the rounding error of `raw`

    @property
    def clipped(self) -> bool:
        """Whether `raw` was negative by more than rounding: never with root "exact", possible with "paper_fast"."""
        return self.raw < -self.rounding


def frechet_distance(vision: Tensor, text: Tensor) -> float:
    """Squared Frechet distance between the Gaussians fitted to two matrices of rows.

    Rows are neither scaled nor checked for outliers; :func:`modality_integration_rate` does both.

    Args:
        vision: (N_v, d), any floating dtype, N_v >= 2.
        text: (N_t, d), any floating dtype, N_t >= 2, on the same device.

    Returns:
        Float >= 0, in squared units of the rows.

    Raises:
        NumericsError: wrong shape or dtype, different widths, fewer than two rows, or values that are not finite.

    Ranks: pure.
    Source: arXiv:2410.07167, section 3; sample covariances, computed in float64.

    Example:
        >>> import torch
        >>> from mir_callback import frechet_distance
        >>> rows = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 0.0]])
        >>> frechet_distance(rows + 3.0, rows)  # means differ by 3 in each of two dimensions
        18.0
    """
    check_rows(vision, text)
    return frechet_from_moments(GaussianPair(compute_moments(vision), compute_moments(text))).distance


def frechet_from_moments(pair: GaussianPair, root: str = "exact", vision_scale: float = 1.0) -> FrechetResult:
    """Squared Frechet distance of two Gaussians given by their moments. Ranks: pure.

    With ``vision_scale`` it is that of the vision rows times this number. A second scale of one pair costs little.

    Raises ConfigError for an unknown root, and NumericsError if the distance of the means overflows float64.
    Source: arXiv:2410.07167, equation of FD in section 3.
    """
    check_root(root)
    vision, text = pair.vision, pair.text
    mean_part = (vision_scale * vision.mean - text.mean).square().sum().item()
    require_finite(mean_part)
    if root == "exact":
        part, error = compute_covariance_part(pair, mean_part, vision_scale)
    else:
        traces = (vision_scale**2 * vision.trace + text.trace).item()
        sizes = vision_scale**2 * (vision.frobenius_norm * text.frobenius_norm).item()
        part = traces - 2.0 * vision_scale**2 * pair.cross().square().sum().item()  # tr(S_v S_t) = ||A B^T||^2
        error = 16.0 * _EPS * (mean_part + traces + len(pair.first.factor) * sizes)
    # The means themselves are rounded, which matters if they are large and nearly equal.
    off = 8.0 * _EPS * (vision_scale * vision.mean.norm() + text.mean.norm()).item()
    raw, rounding = mean_part + part, error + 2.0 * mean_part**0.5 * off + off**2
    return FrechetResult(distance=raw if raw > rounding else 0.0, raw=raw, rounding=rounding)


def compute_companions(
    pair: GaussianPair, root: str, distance: float, vision_norm: float, text_norm: float
) -> dict[str, float]:
    """What explains the distance of a layer, from its moments and at almost no cost. Ranks: pure.

    By the names in COMPANIONS: the squared distance of the means, and the rest of FD, which is due to the covariances;
    the ratio of the mean norms, vision over text, of the raw rows including outliers; the cosine between the two means;
    the effective rank (tr S)^2 / tr S^2 of each covariance, between 1 and d, or 0 if all rows are equal; the distance
    with the vision rows scaled to the mean norm of the text rows. Vision rows of zeros stay zeros.
    """
    vision, text = pair.vision, pair.text
    mean_part = (vision.mean - text.mean).square().sum().item()
    lengths = (vision.mean.norm() * text.mean.norm()).item()
    ranks = [
        (each.trace / each.frobenius_norm).item() ** 2 if each.frobenius_norm > 0.0 else 0.0 for each in (vision, text)
    ]
    cosine = (vision.mean @ text.mean).item() / lengths if lengths > 0.0 else 0.0
    scale_free = frechet_from_moments(pair, root, text_norm / vision_norm if vision_norm > 0.0 else 0.0).distance
    values = (mean_part, distance - mean_part, vision_norm / text_norm, cosine, *ranks, scale_free)
    return dict(zip(COMPANIONS, values, strict=True))


def check_root(root: str) -> None:
    """Raise ConfigError unless ``root`` is one of ROOTS. Ranks: pure."""
    if root not in ROOTS:
        raise ConfigError(f"root must be one of {', '.join(ROOTS)}, got {root!r}.")


def check_rows(vision: Tensor, text: Tensor, where: str = "") -> None:
    """Raise NumericsError unless both are finite floating (N >= 2, d) matrices with the same d. Ranks: pure."""
    for name, rows in ((f"{where}vision", vision), (f"{where}text", text)):
        if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.is_floating_point():
            given = f"{rows.dtype} tensor {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
            raise NumericsError(f"{name} is a {given}. Pass the token rows as one floating (N, d) tensor.")
        if len(rows) < 2:
            raise NumericsError(
                f"{name} has {len(rows)} rows, too few for a covariance. Use more samples or longer texts."
            )
        bad = int((~torch.isfinite(rows)).any(dim=1).sum())
        if bad:
            raise NumericsError(
                f"{name} has NaN or infinity in {bad} of {len(rows)} rows. The model may have diverged, or its dtype "
                "overflowed."
            )
    if vision.shape[1] != text.shape[1]:
        raise NumericsError(
            f"{where}vision rows have width {vision.shape[1]} and text rows {text.shape[1]}. Take both from the same "
            "decoder layer."
        )


def warn_if_clipped(result: FrechetResult, layer: int, root: str) -> None:
    """Warn if a layer's distance was negative by more than rounding and was set to zero. Ranks: pure."""
    if result.clipped:
        log.warning(
            "layer %d: root=%r gave a negative distance, %.3e, which is more than rounding (%.1e) and counts as 0. "
            "'paper_fast' is an approximation that can become negative; root='exact' does not.",
            *(layer, root, result.raw, result.rounding),
        )
