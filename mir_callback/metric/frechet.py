# SPDX-License-Identifier: Apache-2.0
"""What else the moments of a layer tell, at next to no cost: why a distance is what it is."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mir_callback.errors import ConfigError, NumericsError
from mir_callback.metric.coupling import Coupling, Factored, couple, covariance_part, factored, require_finite
from mir_callback.metric.linalg import product
from mir_callback.metric.moments import Moments, moments_of

Root = Literal["exact", "paper_fast"]
ROOTS: tuple[str, ...] = get_args(Root)

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Frechet:
    """A Frechet distance and how far to trust it.

    Attributes:
        distance: FD >= 0; rounding below zero, and anything smaller than ``rounding``, is 0.
        raw: the value before clipping.
        rounding: generous estimate of the rounding error of ``raw``, from the sizes of means and covariances.
    """

    distance: float
    raw: float
    rounding: float

    @property
    def clipped(self) -> bool:
        """Whether more than rounding was clipped away: never with the exact root, possible with ``paper_fast``."""
        return self.raw < -self.rounding


def check_root(root: str) -> None:
    """Raise ConfigError unless ``root`` is one of ROOTS. Ranks: pure."""
    if root not in ROOTS:
        raise ConfigError(f"root must be one of {', '.join(ROOTS)}, got {root!r}; use root='exact' for the paper's MIR")


def frechet_from_moments(vision: Moments, text: Moments, root: str = "exact") -> Frechet:
    """Frechet distance of two clouds given by their moments.

    Args:
        vision: moments of the vision rows, dimension d.
        text: moments of the text rows, same d, same device.
        root: "exact" or "paper_fast".

    Returns:
        The distance with its rounding bound; unitless when the rows were scaled to a mean text norm of one.

    Raises:
        ConfigError: unknown root.
        NumericsError: the moments are not finite.

    Ranks: pure.
    Source: arXiv:2410.07167, equation of FD in section 3.
    """
    check_root(root)
    if root == "exact":
        return frechet_from_coupling(couple(factored(vision), factored(text)))
    gap = _squared_gap(vision, text)
    traces = (vision.trace + text.trace).item()
    term = _trace_of_product(vision, text)
    return _frechet(vision, text, gap, traces - 2.0 * term, 16.0 * _EPS * (gap + traces + 2.0 * abs(term)))


def frechet_from_coupling(coupling: Coupling) -> Frechet:
    """:func:`frechet_from_moments` with the exact root, of clouds whose covariances are factored. Ranks: pure."""
    gap = _squared_gap(coupling.vision, coupling.text)
    return _frechet(coupling.vision, coupling.text, gap, *covariance_part(coupling, gap))


def _squared_gap(vision: Moments | Factored, text: Moments | Factored) -> float:
    gap = (vision.mean - text.mean).square().sum().item()
    require_finite(gap + (vision.trace + text.trace).item())
    return gap


def _frechet(vision: Moments | Factored, text: Moments | Factored, gap: float, part: float, error: float) -> Frechet:
    """From the part that the means make, and that of the covariances with its error."""
    # The means themselves are rounded, which counts where large ones are all but equal.
    off = 8.0 * _EPS * (vision.mean.norm() + text.mean.norm()).item()
    raw = gap + part
    rounding = error + 2.0 * gap**0.5 * off + off**2
    return Frechet(distance=raw if raw > rounding else 0.0, raw=raw, rounding=rounding)


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
    """
    check_rows(vision, text)
    return frechet_from_moments(moments_of(vision), moments_of(text)).distance


def check_rows(vision: Tensor, text: Tensor, where: str = "") -> None:
    """Raise NumericsError unless both are finite floating (N >= 2, d) matrices of one d. Ranks: pure."""
    for name, rows in (("vision", vision), ("text", text)):
        field = f"{where}{name}"
        if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.is_floating_point():
            got = f"{tuple(rows.shape)} {rows.dtype}" if isinstance(rows, Tensor) else type(rows).__name__
            raise NumericsError(f"{field} must be a floating (N, d) tensor, got {got}; stack token rows first")
        if rows.shape[0] < 2:
            raise NumericsError(
                f"{field} must have at least 2 rows for a sample covariance, got {rows.shape[0]}; "
                "use more samples or longer texts"
            )
        if not bool(torch.isfinite(rows).all()):
            bad = int((~torch.isfinite(rows)).any(dim=1).sum())
            raise NumericsError(
                f"{field} must be finite, got NaN or infinity in {bad} of {rows.shape[0]} rows; "
                "look for divergence or an overflow of the training dtype"
            )
    if vision.shape[1] != text.shape[1]:
        raise NumericsError(
            f"{where}vision and text must have the same width d, got {vision.shape[1]} and {text.shape[1]}; "
            "take both from the same decoder layer"
        )


def warn_if_clipped(result: Frechet, layer: int, root: str) -> None:
    """Say aloud that a layer's distance was clipped at zero by more than rounding. Ranks: pure."""
    if result.clipped:
        warnings.warn(
            f"layer {layer}: root={root!r} gave a distance of {result.raw:.3e}, clipped to 0; it lies below zero by "
            f"more than rounding ({result.rounding:.1e}), as 'paper_fast' can for strongly correlated clouds",
            stacklevel=3,
        )


def _trace_of_product(vision: Moments, text: Moments) -> float:
    """tr(S_v S_t)."""
    if vision.covariance is not None and text.covariance is not None:
        return (vision.covariance * text.covariance).sum().item()
    left, right = (vision, text) if vision.factor is not None else (text, vision)
    assert left.factor is not None
    if right.factor is not None:
        return product(left.factor, right.factor.T).square().sum().item()
    assert right.covariance is not None
    return (product(left.factor, right.covariance) * left.factor).sum().item()


# Names of the values, as reports and logs have them.
COMPANIONS = ("mean_part", "covariance_part", "norm_ratio", "cosine", "vision_rank", "text_rank")


def companions_of(
    vision: Moments | Factored, text: Moments | Factored, distance: float, vision_norm: float, text_norm: float
) -> dict[str, float]:
    """Companions of one layer's distance.

    Args:
        vision: moments of the scaled vision rows, outliers replaced.
        text: the same of the text rows.
        distance: their FD.
        vision_norm: mean norm of the raw vision rows, outliers included.
        text_norm: the same of the text rows.

    Returns:
        By the names in COMPANIONS: the part of FD that the means' gap makes, and the rest, which the covariances
        make; the norms' ratio; the cosine between the two means; the effective rank (tr S)^2 / tr S^2 of each
        covariance, between 1 and d, 0 for rows that are all alike.

    Ranks: pure.
    """
    mean_part = (vision.mean - text.mean).square().sum().item()
    lengths = (vision.mean.norm() * text.mean.norm()).item()
    return {
        "mean_part": mean_part,
        "covariance_part": distance - mean_part,
        "norm_ratio": vision_norm / text_norm,
        "cosine": (vision.mean @ text.mean).item() / lengths if lengths > 0.0 else 0.0,
        "vision_rank": effective_rank(vision),
        "text_rank": effective_rank(text),
    }


def effective_rank(moments: Moments | Factored) -> float:
    """(tr S)^2 / tr S^2, the number of equally strong directions that would look alike. Ranks: pure."""
    size = moments.size.item()
    return (moments.trace.item() / size) ** 2 if size > 0.0 else 0.0
