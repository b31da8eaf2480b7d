# SPDX-License-Identifier: Apache-2.0
"""Synthetic clouds of token rows on which MIR computations tend to go wrong."""

from __future__ import annotations

import torch

DIM = 96


def generator(seed: int) -> torch.Generator:
    """A seeded random source."""
    return torch.Generator().manual_seed(seed)


def _normal(rng: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def _basis(rng: torch.Generator, dim: int) -> torch.Tensor:
    return torch.linalg.qr(_normal(rng, dim, dim))[0]


def equal(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two draws of one distribution."""
    return _normal(rng, 400, DIM), _normal(rng, 500, DIM)


def offset(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Means far apart against the spread."""
    return _normal(rng, 400, DIM) + 30.0, _normal(rng, 500, DIM) - 5.0


def conditioned(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Covariances of condition number 1e8, in different bases."""
    spread = torch.logspace(0, -4, DIM, dtype=torch.float64)
    return (
        _normal(rng, 400, DIM) * spread @ _basis(rng, DIM),
        _normal(rng, 500, DIM) * spread @ _basis(rng, DIM),
    )


def conditioned_alike(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of condition number 1e8 (covariances 1e16) in one basis, so that the distance itself is small."""
    spread, basis = torch.logspace(0, -8, DIM, dtype=torch.float64), _basis(rng, DIM)
    return _normal(rng, 400, DIM) * spread @ basis, _normal(rng, 500, DIM) * spread @ basis


def rank_deficient(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular covariances although there are more rows than dimensions."""
    return _normal(rng, 400, 12) @ _normal(rng, 12, DIM), _normal(rng, 500, 20) @ _normal(rng, 20, DIM)


def few_rows(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Fewer rows than dimensions in both modalities."""
    return _normal(rng, 31, DIM) + 1.0, _normal(rng, 47, DIM)


def few_vision_rows(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Fewer rows than dimensions in one modality."""
    return _normal(rng, 31, DIM), _normal(rng, 500, DIM) * 2


def few_text_rows(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Fewer rows than dimensions in the other."""
    return _normal(rng, 400, DIM), _normal(rng, 31, DIM) * 2


def massive(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two dimensions a thousand times larger than the rest."""
    scale = torch.ones(DIM, dtype=torch.float64)
    scale[[7, 55]] = 1000.0
    return _normal(rng, 400, DIM) * scale + 0.1, _normal(rng, 500, DIM) * scale


def massive_constant(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Two dimensions with a huge constant and little spread, as in real language models."""
    constant = torch.zeros(DIM, dtype=torch.float64)
    constant[[7, 55]] = 1000.0
    return _normal(rng, 400, DIM) + constant, 0.5 * _normal(rng, 500, DIM) + constant


def with_outliers(rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A few rows far longer than the others, as the 3-sigma rule is for."""
    vision, text = equal(rng)
    vision[::90] *= 25.0
    text[::120] *= 40.0
    return vision, text


CASES = {
    case.__name__: case
    for case in (
        equal,
        offset,
        conditioned,
        conditioned_alike,
        rank_deficient,
        few_rows,
        few_vision_rows,
        few_text_rows,
        massive,
        massive_constant,
        with_outliers,
    )
}
