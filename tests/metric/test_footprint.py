# SPDX-License-Identifier: Apache-2.0
"""Matrices that a solve holds at a time: they decide whether an evaluation fits beside training."""

import ctypes
import math

import pytest
import torch

from mir_callback.evaluation.memory import PeakMemory
from mir_callback.metric.frechet import frechet_from_moments
from mir_callback.metric.influence import compute_maps_by_polar_factor, compute_transport_maps
from mir_callback.metric.matrix_sqrt import GaussianPair
from mir_callback.metric.moments import moments_from_scatter

DIM = 1024
M_MMAP_THRESHOLD = -3  # of malloc.h


def scatter(dim, seed):
    rng = torch.Generator().manual_seed(seed)
    parts = (torch.randn(dim, dim, generator=rng, dtype=torch.float64) for _ in range(2))
    return sum((rows.T @ rows for rows in parts), torch.zeros(dim, dim, dtype=torch.float64))


def solve(scatters, way):
    dim = len(scatters[0])
    mean = torch.zeros(dim, dtype=torch.float64)
    moments = [moments_from_scatter(2 * dim, mean, scatters.pop()) for _ in range(2)]
    pair = GaussianPair(*moments, need_maps=way == "eigenvectors")
    if way == "polar factor":
        assert pair.polar.error_bound < math.inf
        assert compute_maps_by_polar_factor(pair) is not None
        return
    assert frechet_from_moments(pair).distance > 0.0
    if way == "eigenvectors":
        compute_transport_maps(pair)


def matrices_held(way):
    """Most matrices (d, d) in float64 at a time, the two scatters that it begins with among them."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)  # what is let go of goes back to the system
    solve([scatter(DIM // 4, 1), scatter(DIM // 4, 2)], way)  # after which the libraries have room of their own
    scatters = [scatter(DIM, 1), scatter(DIM, 2)]
    peak = PeakMemory(torch.device("cpu"))
    solve(scatters, way)
    return 2.0 + peak.sample() / (DIM * DIM * 8)


@pytest.mark.parametrize(("way", "most"), [("eigenvalues", 4), ("eigenvectors", 7), ("polar factor", 8)])
def test_a_solve_holds_no_more_matrices_than_the_documents_say(way, most, fresh_process):
    # Half a matrix is left for what is not square, and for the allocator's pages.
    assert fresh_process.submit(matrices_held, way).result(300) < most + 0.5
