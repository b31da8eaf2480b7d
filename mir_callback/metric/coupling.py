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

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mir_callback.metric.blas import eigh, eigvalsh, product, singular_values, svd
from mir_callback.metric.factors import Factored
from mir_callback.metric.polar import near_polar_factor, nuclear_norm

_EPS = torch.finfo(torch.float64).eps
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
        part, part_error = traces - 2.0 * term, 2.0 * error + 16.0 * _EPS * traces
        if part_error <= _TOLERANCE * (gap + part):
            return part, part_error
    return _by_alignment(coupling)


def _nuclear_norms(coupling: Coupling) -> Iterator[tuple[float, float]]:
    """The nuclear norm of C and an estimate of its error, from the cheapest way to the most precise."""
    if len(coupling.first) == 0:
        yield 0.0, 0.0
        return
    # Of C itself: each singular value moves by at most the rounding of the product.
    rounding = 8.0 * _EPS * len(coupling.first) * (coupling.vision.size * coupling.text.size).sqrt().item()
    if coupling.on_gpu and not coupling.knows_vectors and coupling.polar.norm is not None:
        norm, bound = coupling.polar.norm
        yield norm, bound + rounding
    term, error = _by_eigenvalues(coupling.eigenvalues)
    yield term, error + rounding
    yield singular_values(coupling.cross()).sum().item(), rounding


def _by_eigenvalues(values: Tensor) -> tuple[float, float]:
    """Sum of the roots of the eigenvalues of C C^T, and how far their rounding moves it."""
    roots = values.clamp_min(0.0).sqrt()
    noise = 8.0 * _EPS * values.norm()
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
    off = sum(_squared_error_of_factor(each) for each in (vision, text)) + 64.0 * _EPS**2 * (vision.trace + text.trace)
    moved = _to_second_order(8.0 * _EPS * (vision.size * text.size).sqrt(), values)
    return part.item(), (2.0 * (part * off).sqrt() + off + moved).item()


def _squared_error_of_factor(cloud: Factored) -> Tensor:
    """Square of how far a factor is, but for a rotation, from an exact one of the exact covariance; 0-d."""
    centring = 64.0 * _EPS**2 * cloud.mean.square().sum()
    if cloud.kind == "rows":
        return centring + 64.0 * _EPS**2 * cloud.trace
    variances = cloud.mean.new_zeros(len(cloud.mean))  # of the directions that were dropped
    variances[: len(cloud.factor)] = eigvalsh(product(cloud.factor, cloud.factor.T))
    return centring + _to_second_order(8.0 * _EPS * cloud.size, 2.0 * variances)


def _to_second_order(error: Tensor, values: Tensor) -> Tensor:
    """What an error of the size ``error`` in the direction of each value does where its first order vanishes; 0-d."""
    return torch.minimum(error.expand_as(values), error.square() / values.clamp_min(1e-300)).sum()
