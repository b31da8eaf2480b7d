# SPDX-License-Identifier: Apache-2.0
"""Frechet distance between two clouds of token rows, and the two ways to find its last term.

    FD = ||mu_v - mu_t||^2 + tr S_v + tr S_t - 2 T

``root="exact"``:      T = tr((S_v S_t)^(1/2)), the paper's definition.
``root="paper_fast"``: T = tr(S_v S_t), the analytic value of what the authors' fast mode computes.

For any factors S_v = A^T A and S_t = B^T B, tr((S_v S_t)^(1/2)) is the nuclear norm of A B^T, that is the sum of
square roots of the eigenvalues of A S_t A^T. The eigenvalues are cheap, but a small one is only known up to the
rounding of the largest, and the square root magnifies that. On a GPU the polar factor of A B^T is cheaper still, but
may leave the smallest singular values out. So each cheap way comes with a bound of its error, and where that is too
large for the distance at hand the singular values of A B^T, which do not suffer, are used.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mir_callback.errors import ConfigError, NumericsError
from mir_callback.metric.moments import Moments, moments_of
from mir_callback.metric.polar import nuclear_norm

Root = Literal["exact", "paper_fast"]
ROOTS: tuple[str, ...] = get_args(Root)

_EPS = torch.finfo(torch.float64).eps
# A cheap way is good enough while even the generous estimate of its error moves log10(FD) by less than 1e-6.
_TOLERANCE = 2e-6


@dataclass(frozen=True)
class Frechet:
    """A Frechet distance and how far to trust it.

    Attributes:
        distance: FD >= 0; rounding below zero, and anything smaller than ``rounding``, is 0.
        raw: the value before clipping.
        rounding: generous estimate of the rounding error of ``raw``, from the sizes of the covariances.
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
    mean_gap = (vision.mean - text.mean).square().sum()
    base = (mean_gap + vision.trace + text.trace).item()
    if not math.isfinite(base):
        raise NumericsError(f"moments must be finite, got a trace and mean gap of {base}; look for NaN or infinity")
    term, error = _cross_term(vision, text, root, base)
    raw = base - 2.0 * term
    rounding = 2.0 * error + 16.0 * _EPS * base
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


def _cross_term(vision: Moments, text: Moments, root: str, base: float) -> tuple[float, float]:
    """The term T of the distance and an estimate of its error."""
    if root == "paper_fast":
        term = _trace_of_product(vision, text)
        return term, 16.0 * _EPS * abs(term)
    left, right = (vision, text) if _prefers_left(vision, text) else (text, vision)
    ways = (_root_by_polar_factor, _root_by_eigenvalues) if left.mean.is_cuda else (_root_by_eigenvalues,)
    for way in ways:
        found = way(left, right)
        if found is not None:
            term, error = found
            if 2.0 * error <= _TOLERANCE * (base - 2.0 * term):
                return term, error
    return _root_by_singular_values(left, right)


def _trace_of_product(vision: Moments, text: Moments) -> float:
    """tr(S_v S_t)."""
    if vision.covariance is not None and text.covariance is not None:
        return (vision.covariance * text.covariance).sum().item()
    left, right = (vision, text) if vision.factor is not None else (text, vision)
    assert left.factor is not None
    if right.factor is not None:
        return (left.factor @ right.factor.T).square().sum().item()
    assert right.covariance is not None
    return ((left.factor @ right.covariance) * left.factor).sum().item()


def _prefers_left(vision: Moments, text: Moments) -> bool:
    """Whether vision is the side to factor: the one whose factor has fewer rows, as that sizes the eigenproblem."""
    if vision.factor is not None and text.factor is not None:
        return vision.count <= text.count
    return text.factor is None


def _root_by_polar_factor(left: Moments, right: Moments) -> tuple[float, float] | None:
    """Nuclear norm of A B^T as a GPU finds it fastest, with a proven bound of its error; None if there is none."""
    return nuclear_norm(_factor(left) @ _factor(right).T)


def _root_by_eigenvalues(left: Moments, right: Moments) -> tuple[float, float] | None:
    """Sum of root eigenvalues of A S A^T with an estimate of its error; None if ``left`` has no Cholesky factor."""
    a = left.factor
    if a is None:
        assert left.covariance is not None
        a = _cholesky(left.covariance)
    if a is None:
        return None
    if right.factor is not None:
        c = a @ right.factor.T
        product = c @ c.T
    else:
        assert right.covariance is not None
        product = a @ right.covariance @ a.T
    values = torch.linalg.eigvalsh(0.5 * (product + product.T)).clamp_min(0.0)
    roots = values.sqrt()
    # Rounding of the product, which may cancel, and not only of its eigenvalues.
    noise = 8.0 * _EPS * left.size * right.size
    error = torch.minimum(noise.sqrt().expand_as(roots), noise / (2.0 * roots).clamp_min(1e-300)).sum()
    return roots.sum().item(), error.item()


def _root_by_singular_values(left: Moments, right: Moments) -> tuple[float, float]:
    """Nuclear norm of A B^T; each singular value is good to the rounding of the factors' product."""
    singular = torch.linalg.svdvals(_factor(left) @ _factor(right).T)
    if singular.numel() == 0:
        return 0.0, 0.0
    return singular.sum().item(), (8.0 * _EPS * singular.numel() * (left.size * right.size).sqrt()).item()


def _factor(moments: Moments) -> Tensor:
    """Some A with A^T A = S: the stored factor, Cholesky's, or for a singular S that of its eigenvectors.

    Directions whose variance is below the rounding of the covariance itself carry no information and are dropped.
    """
    if moments.factor is not None:
        return moments.factor
    assert moments.covariance is not None
    upper = _cholesky(moments.covariance)
    if upper is not None:
        return upper
    values: Tensor
    vectors: Tensor
    values, vectors = torch.linalg.eigh(moments.covariance)
    kept = values > len(values) * _EPS * values[-1].clamp_min(0.0)
    return vectors[:, kept].T * values[kept].sqrt()[:, None]


def _cholesky(covariance: Tensor) -> Tensor | None:
    """Upper triangular A with A^T A = S, or None where S is not positive definite to working precision."""
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(covariance)
    return lower.T if info.item() == 0 else None
