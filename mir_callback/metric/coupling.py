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

Source of the polar factor's iteration: Nakatsukasa, Bai and Gygi, "Optimizing Halley's iteration for computing the
matrix polar decomposition", SIAM J. Matrix Anal. Appl. 31 (2010), in its form with Cholesky factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from mir_callback.metric.moments import Moments, eigh, eigvalsh, gram

_EPS = torch.finfo(torch.float64).eps
# A way is good enough while even the generous estimate of its error moves log10(FD) by less than 1e-6.
_TOLERANCE = 2e-6
# Singular values below this share of the largest are not followed all the way to one; the bound accounts for them.
_SMALLEST = 1e-9
_ITERATIONS = 4  # take singular values in [_SMALLEST, 1] to within 2e-7 of one, and the correction squares that
_ROUNDING = 1024.0  # of the iteration in units of eps; up to 450 was seen for condition numbers from 1e12 on


@dataclass(frozen=True)
class Coupling:
    """Two clouds of token rows on one device, by the factors of their covariances.

    Their product C is found anew where it is needed: in most solves once, and memory is dearer.
    """

    vision: Moments
    text: Moments
    # Whether transport maps will be asked for too; on a CPU the distance then comes from the same eigenvectors, which
    # take three times as long as eigenvalues alone.
    maps_wanted: bool = field(default=False, kw_only=True)

    @property
    def turned(self) -> bool:
        """Whether the text comes first."""
        return len(self.vision.factor) > len(self.text.factor)

    @property
    def first(self) -> Moments:
        """The cloud whose factor A (m, d) has no more rows than the other's."""
        return self.text if self.turned else self.vision

    @property
    def second(self) -> Moments:
        """The cloud with the factor B (n, d), m <= n."""
        return self.vision if self.turned else self.text

    @property
    def on_gpu(self) -> bool:
        """Whether products and Cholesky factors are what is cheap."""
        return self.vision.factor.is_cuda

    def cross(self) -> Tensor:
        """C = A B^T (m, n)."""
        return self.first.factor @ self.second.factor.T

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (m,), ascending, and eigenvectors (m, m), in columns, of C C^T."""
        return eigh(gram(self.cross().T))

    @cached_property
    def polar(self) -> Polar | None:
        """The polar factor of C; None if it could not be found."""
        return find_polar_factor(self.cross())


def compute_covariance_part(coupling: Coupling, gap: float) -> tuple[float, float]:
    """The part of the distance that the covariances make, and a generous estimate of its error. Ranks: pure.

    Rounding may leave it below zero. ``gap`` is the part that the means make; what counts is the precision of the sum.
    """
    traces = (coupling.vision.trace + coupling.text.trace).item()
    for term, error in _nuclear_norms(coupling):
        part, part_error = traces - 2.0 * term, 2.0 * error + 16.0 * _EPS * traces
        if part_error <= _TOLERANCE * (gap + part):
            return part, part_error
    return _align(coupling)


def _nuclear_norms(coupling: Coupling) -> Iterator[tuple[float, float]]:
    """The nuclear norm of C and an estimate of its error, from the cheapest way to the most precise."""
    rank = len(coupling.first.factor)
    if not rank:
        yield 0.0, 0.0
        return
    # Of C itself: each singular value moves by at most the rounding of the product.
    rounding = 8.0 * _EPS * rank * (coupling.vision.size * coupling.text.size).sqrt().item()
    if coupling.on_gpu and coupling.polar is not None:
        yield coupling.polar.norm, coupling.polar.bound + rounding
    values = coupling.spectrum[0] if coupling.maps_wanted else eigvalsh(gram(coupling.cross().T))
    roots = values.clamp_min(0.0).sqrt()
    noise = 8.0 * _EPS * values.norm()
    error = torch.minimum(noise.sqrt().expand_as(roots), noise / (2.0 * roots).clamp_min(1e-300)).sum()
    yield roots.sum().item(), error.item() + rounding
    yield torch.linalg.svdvals(coupling.cross()).sum().item(), rounding


def _align(coupling: Coupling) -> tuple[float, float]:
    """||A - Q B||^2, with rows of zeros where A has fewer, and an estimate of its error.

    Whatever moves Q counts to second order only, as Q is where the square is least. What moves A and B moves the root
    of the square, which is a metric between covariances, by no more than their own distance from the exact factors.
    """
    vision, text, first, second = coupling.vision, coupling.text, coupling.first.factor, coupling.second.factor
    left, values, right = torch.linalg.svd(coupling.cross())
    turned = right @ second
    part = (left.T @ first - turned[: len(first)]).square().sum() + turned[len(first) :].square().sum()
    off = sum(_squared_error_of_factor(each) for each in (vision, text)) + 64.0 * _EPS**2 * (vision.trace + text.trace)
    moved = _to_second_order(8.0 * _EPS * (vision.size * text.size).sqrt(), values)
    return part.item(), (2.0 * (part * off).sqrt() + off + moved).item()


def _squared_error_of_factor(moments: Moments) -> Tensor:
    """Square of how far a factor is, but for a rotation, from an exact one of the exact covariance; 0-d."""
    centring = 64.0 * _EPS**2 * moments.mean.square().sum()
    if moments.kind == "rows":
        return centring + 64.0 * _EPS**2 * moments.trace
    variances = moments.mean.new_zeros(len(moments.mean))  # of the directions that were dropped
    variances[: len(moments.factor)] = eigvalsh(gram(moments.factor.T))
    return centring + _to_second_order(8.0 * _EPS * moments.size, 2.0 * variances)


def _to_second_order(error: Tensor, values: Tensor) -> Tensor:
    """What an error of the size ``error`` in the direction of each value does where its first order vanishes; 0-d."""
    return torch.minimum(error.expand_as(values), error.square() / values.clamp_min(1e-300)).sum()


@dataclass(frozen=True)
class Polar:
    """What products and Cholesky factors tell of a matrix.

    Attributes:
        near: what has its singular vectors, and singular values near one, or below for the smallest; (m, n).
        norm: its nuclear norm, the sum of its singular values.
        bound: how far the norm can be off, infinite where nothing could be bounded: about 1e-10 of it for condition
            numbers up to 1e6, growing to 1e-7 beyond.
    """

    near: Tensor
    norm: float
    bound: float


def find_polar_factor(matrix: Tensor) -> Polar | None:
    """Polar factor and nuclear norm of a matrix (m, n) in float64; None if a factorisation failed. Ranks: pure."""
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    near = _iterate_to_polar_factor(tall)
    return None if near is None else Polar(near.T if wide else near, *_bound_nuclear_norm(tall, near))


def _iterate_to_polar_factor(c: Tensor) -> Tensor | None:
    """(m, n) with the singular vectors of ``c``, m >= n, and singular values in [0, 1], near one."""
    square_of_c = c.T @ c
    size = torch.linalg.matrix_norm(square_of_c).item()  # at least the square of the largest singular value
    if not 0.0 < size < math.inf:
        return None
    x, shifted, least = c / math.sqrt(size), square_of_c / size, _SMALLEST
    del square_of_c
    for iteration in range(_ITERATIONS):
        if iteration:
            shifted = x.T @ x
        # The step x (a + b x^2) / (1 + w x^2) that lifts singular values in [least, 1] best.
        spread = (4.0 * (1.0 - least**2) / least**4) ** (1 / 3)
        root = math.sqrt(1.0 + spread)
        a = root + math.sqrt(8.0 - 4.0 * spread + 8.0 * (2.0 - least**2) / (least**2 * root)) / 2.0
        b = (a - 1.0) ** 2 / 4.0
        w = a + b - 1.0
        shifted.mul_(w).diagonal().add_(1.0)
        lower, failed = torch.linalg.cholesky_ex(shifted)
        if failed.item():
            return None
        del shifted
        solved = torch.cholesky_solve(x.T, lower).T
        x = x.mul_(b / w).add_(solved, alpha=a - b / w)
        del lower, solved
        least = least * (a + b * least**2) / (1.0 + w * least**2)
    return x


def _bound_nuclear_norm(c: Tensor, x: Tensor) -> tuple[float, float]:
    """Bounds of the nuclear norm of ``c`` from any ``x`` near its polar factor; the lower one and the gap.

    Q = x (3 - x^T x) / 2 has no singular value above one, and those of x near one are squared towards it. Lower: the
    nuclear norm is the largest inner product of ``c`` with such a Q, at least tr Q^T c. Upper: c = Q k + r with k the
    symmetric part of Q^T c, so the norm is at most ||k||_* + ||r||_*, and ||k||_* is tr k if k is shown to be positive,
    up to a shift, by its Cholesky factor.
    """
    n = c.shape[1]
    square = x.T @ x
    largest = torch.linalg.matrix_norm(square, 1).item()  # column sum, at least the largest eigenvalue
    polish = square.mul_(-0.5)
    polish.diagonal().add_(1.5)
    if not largest < 3.0 and torch.linalg.cholesky_ex(polish)[1].item():  # Q might be longer than one
        return math.nan, math.inf
    k = polish @ (x.T @ c)
    k = k.add(k.T).mul_(0.5)
    polished = polish @ k
    del square, polish
    rest = math.sqrt(n) * torch.linalg.matrix_norm(torch.addmm(c, x, polished, alpha=-1.0)).item()
    del polished
    norm, size = k.trace().item(), torch.linalg.matrix_norm(c).item()
    shift = _ROUNDING * _EPS * size
    k.diagonal().add_(shift)
    if torch.linalg.cholesky_ex(k)[1].item():
        return norm, math.inf
    return norm, 2.0 * n * shift + rest + 8.0 * _EPS * n * size
