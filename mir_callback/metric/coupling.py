# SPDX-License-Identifier: Apache-2.0
"""The part of a Frechet distance that two covariances make, and how far to trust it.

    tr S_v + tr S_t - 2 tr((S_v S_t)^(1/2))

For any factors S_v = A^T A and S_t = B^T B, the last trace is the nuclear norm of C = A B^T. There are four ways to it,
each with an error of its own, and the first whose error does not matter at the distance at hand is taken:

1. on a GPU the polar factor of C, by products and Cholesky factors alone;
2. the eigenvalues of C C^T: cheap, but a small one is only known up to the rounding of the largest, which its square
   root magnifies;
3. the singular values of C, which do not suffer from that;
4. for clouds that are all but equal, where the three traces cancel: the part is ||A - Q B||^2 with the orthogonal Q
   that turns B towards A best, a sum of squares of small differences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from mir_callback.errors import NumericsError
from mir_callback.metric.linalg import cholesky, eigh, eigvalsh, product, singular_values, svd
from mir_callback.metric.moments import Moments

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Factored:
    """Count, mean and covariance of a cloud of token rows, the covariance by a factor.

    Attributes:
        count: number of rows n >= 2.
        mean: (d,) float64.
        factor: A (m, d) float64 with covariance = A^T A.
        kind: what A is: the centred "rows" over the root of n - 1, for n < d; Cholesky's upper "triangle"; or, where
            the covariance is singular, its "eigenvectors" times the roots of their eigenvalues.
        trace: of the covariance, 0-d float64.
        size: Frobenius norm of the covariance, 0-d float64.
    """

    count: int
    mean: Tensor
    factor: Tensor
    kind: Literal["rows", "triangle", "eigenvectors"]
    trace: Tensor
    size: Tensor


def factored(moments: Moments) -> Factored:
    """The same cloud with a factor in place of the covariance.

    Directions whose variance is below the rounding of the covariance itself carry no information and are dropped.

    Raises:
        NumericsError: the moments are not finite.

    Ranks: pure.
    """
    trace, size = moments.trace, moments.size
    require_finite(trace.item())
    if moments.factor is not None:
        return Factored(moments.count, moments.mean, moments.factor, "rows", trace, size)
    assert moments.covariance is not None
    lower = cholesky(moments.covariance)
    if lower is not None:
        return Factored(moments.count, moments.mean, lower.T, "triangle", trace, size)
    values, vectors = eigh(moments.covariance)
    kept = values > len(values) * _EPS * values[-1].clamp_min(0.0)
    factor = vectors[:, kept].T
    factor.mul_(values[kept].sqrt()[:, None])
    return Factored(moments.count, moments.mean, factor, "eigenvectors", trace, size)


def require_finite(base: float) -> None:
    """Raise NumericsError unless a trace, or a sum of them, is finite. Ranks: pure."""
    if not math.isfinite(base):
        raise NumericsError(f"moments must be finite, got a trace and mean gap of {base}; look for NaN or infinity")


# Singular values below this share of the largest are not followed all the way to one; the bound accounts for them.
_SMALLEST = 1e-9
_ITERATIONS = 4  # take singular values in [_SMALLEST, 1] to within 2e-7 of one, and the correction squares that
_ROUNDING = 1024.0  # of the iteration in units of eps; up to 450 was seen for condition numbers from 1e12 on
_EPS_polar = torch.finfo(torch.float64).eps


def nuclear_norm(matrix: Tensor, near: Tensor | None = None) -> tuple[float, float] | None:
    """Sum of the singular values of a matrix and a bound of its error.

    Args:
        matrix: (m, n) float64.
        near: :func:`near_polar_factor` of it, if that is known already.

    Returns:
        The norm, and how far it can be off; None where a factorisation failed or nothing could be bounded. The bound is
        about 1e-10 of the norm for condition numbers up to 1e6, and grows to 1e-7 beyond.

    Ranks: pure.
    """
    near = near_polar_factor(matrix) if near is None else near
    if near is None:
        return None
    return _bounds(matrix, near) if matrix.shape[0] >= matrix.shape[1] else _bounds(matrix.T, near.T)


def near_polar_factor(matrix: Tensor) -> Tensor | None:
    """What has the singular vectors of a matrix (m, n), and singular values near one, or below for the smallest.

    None where a factorisation failed. Ranks: pure.
    """
    if matrix.shape[0] >= matrix.shape[1]:
        return _towards_polar_factor(matrix)
    turned = _towards_polar_factor(matrix.T)
    return None if turned is None else turned.T


def _towards_polar_factor(c: Tensor) -> Tensor | None:
    """(m, n) with the singular vectors of ``c``, m >= n, and singular values in [0, 1], near one."""
    gram = c.T @ c
    square = torch.linalg.matrix_norm(gram).item()  # at least the square of the largest singular value
    if not 0.0 < square < math.inf:
        return None
    x, gram = c / math.sqrt(square), gram / square
    least = _SMALLEST
    for iteration in range(_ITERATIONS):
        if iteration:
            gram = x.T @ x
        a, b, w = _weights(least)
        shifted = gram.mul_(w)
        shifted.diagonal().add_(1.0)
        lower, info = torch.linalg.cholesky_ex(shifted)
        if info.item():
            return None
        del gram, shifted
        solved = torch.cholesky_solve(x.T, lower).T
        x = x.mul_(b / w).add_(solved, alpha=a - b / w)
        del lower, solved
        least = least * (a + b * least**2) / (1.0 + w * least**2)
    return x


def _weights(least: float) -> tuple[float, float, float]:
    """Weights of the step x (a + b x^2) / (1 + c x^2) that lifts singular values in [least, 1] best."""
    spread = (4.0 * (1.0 - least**2) / least**4) ** (1 / 3)
    root = math.sqrt(1.0 + spread)
    a = root + math.sqrt(8.0 - 4.0 * spread + 8.0 * (2.0 - least**2) / (least**2 * root)) / 2.0
    b = (a - 1.0) ** 2 / 4.0
    return a, b, a + b - 1.0


def _bounds(c: Tensor, x: Tensor) -> tuple[float, float] | None:
    """Bounds of the nuclear norm of ``c`` from any ``x`` near its polar factor; the lower one and the gap.

    Q = x (3 - x^T x) / 2 has no singular value above one, and those of x near one are squared towards it. Lower: the
    nuclear norm is the largest inner product of ``c`` with such a Q, at least tr Q^T c. Upper: c = Q k + r with k the
    symmetric part of Q^T c, so the norm is at most ||k||_* + ||r||_*, and ||k||_* is tr k if k is shown to be positive,
    up to a shift, by its Cholesky factor.
    """
    n = c.shape[1]
    gram = x.T @ x
    if not _below_three(gram):
        return None
    polish = gram.mul_(-0.5)
    polish.diagonal().add_(1.5)
    k = polish @ (x.T @ c)
    k = k.add(k.T).mul_(0.5)
    polished = polish @ k
    del gram, polish
    rest = math.sqrt(n) * torch.linalg.matrix_norm(torch.addmm(c, x, polished, alpha=-1.0)).item()
    del polished
    lower = k.trace().item()
    size = torch.linalg.matrix_norm(c).item()
    shift = _ROUNDING * _EPS_polar * size
    k.diagonal().add_(shift)
    if torch.linalg.cholesky_ex(k)[1].item():
        return None
    return lower, 2.0 * n * shift + rest + 8.0 * _EPS_polar * n * size


def _below_three(gram: Tensor) -> bool:
    """Whether no eigenvalue of x^T x exceeds three, so that polishing x gives nothing longer than one."""
    if torch.linalg.matrix_norm(gram, 1).item() < 3.0:  # the largest column sum is at least the largest eigenvalue
        return True
    room = -gram
    room.diagonal().add_(3.0)
    return not torch.linalg.cholesky_ex(room)[1].item()


_EPS_coupling = torch.finfo(torch.float64).eps
# A way is good enough while even the generous estimate of its error moves log10(FD) by less than 1e-6.
_TOLERANCE = 2e-6


@dataclass(frozen=True)
class Coupling:
    """Two clouds by the factors of their covariances.

    Their product C is found anew where it is needed: in most solves once, and memory is dearer.

    Attributes:
        vision: one cloud.
        text: the other.
        turned: whether the first factor belongs to the text.
    """

    vision: Factored
    text: Factored
    turned: bool

    @property
    def first(self) -> Tensor:
        """A (m, d) of one of the clouds, m <= n."""
        return (self.text if self.turned else self.vision).factor

    @property
    def second(self) -> Tensor:
        """B (n, d) of the other."""
        return (self.vision if self.turned else self.text).factor

    @property
    def on_gpu(self) -> bool:
        """Whether products and Cholesky factors are what is cheap."""
        return self.first.is_cuda

    def cross(self) -> Tensor:
        """C = A B^T (m, n)."""
        return product(self.first, self.second.T)

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (m,), ascending, and eigenvectors (m, m), in columns, of C C^T."""
        return eigh(self._square())

    @cached_property
    def polar(self) -> Polar:
        """What comes from near the polar factor of C."""
        cross = self.cross()
        near = near_polar_factor(cross)
        return Polar(near, None if near is None else nuclear_norm(cross, near))

    @property
    def knows_vectors(self) -> bool:
        """Whether ``spectrum`` has been found already."""
        return "spectrum" in self.__dict__

    def find_vectors(self) -> None:
        """Find ``spectrum`` now; the distance is then found from it too."""
        _ = self.spectrum

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Those eigenvalues alone, which take a third of the time where the vectors are not wanted too."""
        return self.spectrum[0] if self.knows_vectors else eigvalsh(self._square())

    def _square(self) -> Tensor:
        cross = self.cross()
        return product(cross, cross.T)


@dataclass(frozen=True)
class Polar:
    """What products and Cholesky factors tell of C.

    Attributes:
        near: what is near its polar factor, (m, n); None if it could not be found.
        norm: its nuclear norm and a bound of the error; None if there is none.
    """

    near: Tensor | None
    norm: tuple[float, float] | None


def couple(vision: Factored, text: Factored) -> Coupling:
    """Two clouds on the same device. Ranks: pure."""
    return Coupling(vision, text, turned=len(vision.factor) > len(text.factor))


def covariance_part(coupling: Coupling, gap: float) -> tuple[float, float]:
    """The part of the distance that the covariances make.

    Args:
        coupling: of the two clouds.
        gap: the part that their means make; what counts is the precision of the sum.

    Returns:
        The part, which rounding may leave below zero, and a generous estimate of its error.

    Ranks: pure.
    """
    traces = (coupling.vision.trace + coupling.text.trace).item()
    for term, error in _nuclear_norms(coupling):
        part, part_error = traces - 2.0 * term, 2.0 * error + 16.0 * _EPS_coupling * traces
        if part_error <= _TOLERANCE * (gap + part):
            return part, part_error
    return _by_alignment(coupling)


def _nuclear_norms(coupling: Coupling) -> Iterator[tuple[float, float]]:
    """The nuclear norm of C and an estimate of its error, from the cheapest way to the most precise."""
    if len(coupling.first) == 0:
        yield 0.0, 0.0
        return
    # Of C itself: each singular value moves by at most the rounding of the product.
    rounding = 8.0 * _EPS_coupling * len(coupling.first) * (coupling.vision.size * coupling.text.size).sqrt().item()
    if coupling.on_gpu and not coupling.knows_vectors and coupling.polar.norm is not None:
        norm, bound = coupling.polar.norm
        yield norm, bound + rounding
    term, error = _by_eigenvalues(coupling.eigenvalues)
    yield term, error + rounding
    yield singular_values(coupling.cross()).sum().item(), rounding


def _by_eigenvalues(values: Tensor) -> tuple[float, float]:
    """Sum of the roots of the eigenvalues of C C^T, and how far their rounding moves it."""
    roots = values.clamp_min(0.0).sqrt()
    noise = 8.0 * _EPS_coupling * values.norm()
    error = torch.minimum(noise.sqrt().expand_as(roots), noise / (2.0 * roots).clamp_min(1e-300)).sum()
    return roots.sum().item(), error.item()


def _by_alignment(coupling: Coupling) -> tuple[float, float]:
    """||A - Q B||^2, with rows of zeros where A has fewer, and an estimate of its error.

    Whatever moves Q counts to second order only, as Q is where the square is least. What moves A and B moves the root
    of the square, which is a metric between covariances, by no more than their own distance from the exact factors.
    """
    vision, text, first, second = coupling.vision, coupling.text, coupling.first, coupling.second
    left, values, right = svd(coupling.cross())
    turned = product(right, second)
    part = (product(left.T, first) - turned[: len(first)]).square().sum() + turned[len(first) :].square().sum()
    off = sum(_squared_error_of_factor(each) for each in (vision, text)) + 64.0 * _EPS_coupling**2 * (
        vision.trace + text.trace
    )
    moved = _to_second_order(8.0 * _EPS_coupling * (vision.size * text.size).sqrt(), values)
    return part.item(), (2.0 * (part * off).sqrt() + off + moved).item()


def _squared_error_of_factor(cloud: Factored) -> Tensor:
    """Square of how far a factor is, but for a rotation, from an exact one of the exact covariance; 0-d."""
    centring = 64.0 * _EPS_coupling**2 * cloud.mean.square().sum()
    if cloud.kind == "rows":
        return centring + 64.0 * _EPS_coupling**2 * cloud.trace
    variances = cloud.mean.new_zeros(len(cloud.mean))  # of the directions that were dropped
    variances[: len(cloud.factor)] = eigvalsh(product(cloud.factor, cloud.factor.T))
    return centring + _to_second_order(8.0 * _EPS_coupling * cloud.size, 2.0 * variances)


def _to_second_order(error: Tensor, values: Tensor) -> Tensor:
    """What an error of the size ``error`` in the direction of each value does where its first order vanishes; 0-d."""
    return torch.minimum(error.expand_as(values), error.square() / values.clamp_min(1e-300)).sum()
