# SPDX-License-Identifier: Apache-2.0
"""The covariance part of a Frechet distance, with the trace of the matrix square root and a bound on its error.

    tr S_v + tr S_t - 2 tr((S_v S_t)^(1/2))

For any factors S_v = A^T A and S_t = B^T B, the last trace is the nuclear norm of C = A B^T, the sum of its singular
values. It can be computed in four ways, tried in this order until the error is small compared with the distance:

1. on a GPU, from the polar factor of C, by matrix products and Cholesky factorisations alone;
2. from the eigenvalues of C C^T: cheap, but a small eigenvalue is only known up to the rounding of the largest, and
   its square root magnifies that error;
3. from the singular values of C, which do not suffer from that;
4. for covariances that are nearly equal, where the three traces cancel: the whole part is min ||A - Q B||^2 over
   orthogonal Q (orthogonal Procrustes), a sum of squares of small differences.

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
# Relative error of FD that is accepted: it moves log10(FD) by less than 1e-6.
_TOLERANCE = 2e-6
# Smaller singular values, relative to the largest, do not converge to one; the error bound accounts for them.
_SMALLEST = 1e-9
_ITERATIONS = 4  # bring singular values in [_SMALLEST, 1] to within 2e-7 of one, and the correction squares that
_ROUNDING = 1024.0  # of the iteration, in units of eps; the largest measured is 450, for condition numbers above 1e12


@dataclass(frozen=True)
class GaussianPair:
    """The Gaussians fitted to the vision rows and the text rows of a layer, on one device."""

    vision: Moments
    text: Moments
    # Whether transport maps are computed too. On a CPU both then use the eigenvectors, which take three times as long
    # as the eigenvalues alone.
    need_maps: bool = field(default=False, kw_only=True)

    @property
    def swapped(self) -> bool:
        """Whether ``first`` is the text."""
        return len(self.vision.factor) > len(self.text.factor)

    @property
    def first(self) -> Moments:
        """The Gaussian with the smaller factor, A (m, d)."""
        return self.text if self.swapped else self.vision

    @property
    def second(self) -> Moments:
        """The Gaussian with the larger factor, B (n, d), m <= n."""
        return self.vision if self.swapped else self.text

    @property
    def on_gpu(self) -> bool:
        """Whether products and Cholesky factorisations are much cheaper than eigenvalues."""
        return self.vision.factor.is_cuda

    def cross(self) -> Tensor:
        """C = A B^T (m, n). Not cached: it is mostly needed once, and memory is scarcer than time."""
        return self.first.factor @ self.second.factor.T

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (m,), ascending, and eigenvectors (m, m), in columns, of C C^T."""
        return eigh(gram(self.cross().T))

    @cached_property
    def eigenvalues(self) -> Tensor:
        """Those of ``spectrum``, without eigenvectors unless they are needed."""
        return self.spectrum[0] if self.need_maps else eigvalsh(gram(self.cross().T))

    @cached_property
    def singular_values(self) -> Tensor:
        """Singular values (m,) of C."""
        values: Tensor = torch.linalg.svdvals(self.cross())
        return values

    @cached_property
    def decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Singular vectors and values of C: (m, m), (m,), (n, n)."""
        left, values, right = torch.linalg.svd(self.cross())
        return left, values, right

    @cached_property
    def polar(self) -> PolarFactor | None:
        """The polar factor of C; None if a factorisation failed."""
        return find_polar_factor(self.cross())


def compute_covariance_part(pair: GaussianPair, mean_part: float, vision_scale: float = 1.0) -> tuple[float, float]:
    """The covariance part of the distance, and an upper estimate of its error. Ranks: pure.

    Rounding may make it negative. It is as precise as its sum with ``mean_part``, the squared distance of the means,
    requires. With ``vision_scale`` it is that of the vision rows times this number, of at least 0: C is only multiplied
    by it, so no method is repeated that has been tried for another scale.
    """
    traces = (vision_scale**2 * pair.vision.trace + pair.text.trace).item()
    for term, error in _nuclear_norms(pair):
        part, part_error = traces - 2.0 * vision_scale * term, 2.0 * vision_scale * error + 16.0 * _EPS * traces
        if part_error <= _TOLERANCE * (mean_part + part):
            return part, part_error
    return _procrustes(pair, vision_scale)


def _nuclear_norms(pair: GaussianPair) -> Iterator[tuple[float, float]]:
    """The nuclear norm of C and an estimate of its error, by each method from the cheapest to the most precise."""
    rank = len(pair.first.factor)
    if not rank:
        yield 0.0, 0.0
        return
    # The rounding of C itself moves each singular value by at most that much.
    rounding = 8.0 * _EPS * rank * (pair.vision.frobenius_norm * pair.text.frobenius_norm).sqrt().item()
    if pair.on_gpu and pair.polar is not None:
        yield pair.polar.nuclear_norm, pair.polar.error_bound + rounding
    values = pair.eigenvalues
    roots = values.clamp_min(0.0).sqrt()
    noise = 8.0 * _EPS * values.norm()
    error = torch.minimum(noise.sqrt().expand_as(roots), noise / (2.0 * roots).clamp_min(1e-300)).sum()
    yield roots.sum().item(), error.item() + rounding
    yield pair.singular_values.sum().item(), rounding


def _procrustes(pair: GaussianPair, vision_scale: float) -> tuple[float, float]:
    """Min ||A - Q B||^2 over orthogonal Q, A padded with zero rows, and an estimate of its error.

    Errors of Q only count to second order, because Q is at the minimum. Errors of A and B change the square root of
    the value, which is a metric between covariances (Bures), by at most their distance from the exact factors.
    """
    vision, text, scales = pair.vision, pair.text, (1.0, vision_scale) if pair.swapped else (vision_scale, 1.0)
    left, values, right = pair.decomposed
    first, second = left.T @ pair.first.factor * scales[0], right @ pair.second.factor * scales[1]
    part = (first - second[: len(first)]).square().sum() + second[len(first) :].square().sum()
    off = vision_scale**2 * _squared_error_of_factor(vision) + _squared_error_of_factor(text)
    off += 64.0 * _EPS**2 * (vision_scale**2 * vision.trace + text.trace)
    rounding = 8.0 * _EPS * (vision.frobenius_norm * text.frobenius_norm).sqrt()
    moved = vision_scale * _to_second_order(rounding, values)
    return part.item(), (2.0 * (part * off).sqrt() + off + moved).item()


def _squared_error_of_factor(moments: Moments) -> Tensor:
    """Squared distance of a factor from the nearest exact factor of the exact covariance; 0-d."""
    centring = 64.0 * _EPS**2 * moments.mean.square().sum()
    if moments.kind == "rows":
        return centring + 64.0 * _EPS**2 * moments.trace
    variances = moments.mean.new_zeros(len(moments.mean))  # zero in the directions that were dropped
    variances[: len(moments.factor)] = eigvalsh(gram(moments.factor.T))
    return centring + _to_second_order(8.0 * _EPS * moments.frobenius_norm, 2.0 * variances)


def _to_second_order(error: Tensor, values: Tensor) -> Tensor:
    """Effect of an error of size ``error`` along each singular value when the first order vanishes; 0-d."""
    return torch.minimum(error.expand_as(values), error.square() / values.clamp_min(1e-300)).sum()


@dataclass(frozen=True)
class PolarFactor:
    """Approximate polar factor and nuclear norm of a matrix.

    Attributes:
        factor: (m, n), with the matrix's singular vectors and singular values near one, smaller only for the smallest.
        nuclear_norm: the sum of the matrix's singular values.
        error_bound: of the nuclear norm: about 1e-10 of it for condition numbers up to 1e6, growing to 1e-7 beyond;
            infinite if no bound could be proved.
    """

    factor: Tensor
    nuclear_norm: float
    error_bound: float


def find_polar_factor(matrix: Tensor) -> PolarFactor | None:
    """Polar factor and nuclear norm of a matrix (m, n) in float64; None if a factorisation failed. Ranks: pure."""
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    factor = _halley_iteration(tall)
    return None if factor is None else PolarFactor(factor.T if wide else factor, *_bound_nuclear_norm(tall, factor))


def _halley_iteration(c: Tensor) -> Tensor | None:
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
        # The step x (a + b x^2) / (1 + w x^2) with the best a, b and w for singular values in [least, 1].
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
    """Lower bound of the nuclear norm of ``c``, and the distance to an upper bound, from an approximate polar factor x.

    Q = x (3 - x^T x) / 2 has no singular value above one, and brings those of x that are near one quadratically closer.
    Lower bound: the nuclear norm is the maximum of tr Q^T c over all such Q. Upper bound: c = Q k + r with k the
    symmetric part of Q^T c, so the norm is at most ||k||_* + ||r||_*; and ||k||_* is tr k if k, up to a shift, is
    positive definite, which its Cholesky factorisation shows.
    """
    n = c.shape[1]
    square = x.T @ x
    largest = torch.linalg.matrix_norm(square, 1).item()  # column sum, at least the largest eigenvalue
    polish = square.mul_(-0.5)
    polish.diagonal().add_(1.5)
    if not largest < 3.0 and torch.linalg.cholesky_ex(polish)[1].item():  # Q might have singular values above one
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
