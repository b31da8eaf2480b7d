# SPDX-License-Identifier: Apache-2.0
"""The nuclear norm from the polar factor lies within the bound it gives, whatever the matrix."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mir_callback.metric.matrix_sqrt import find_polar_factor
from mir_callback.metric.moments import compute_moments
from tests.clouds import CASES, generator


def with_singular_values(values, seed=0, rows=None):
    """A matrix of these singular values in random bases."""
    rng = generator(seed)
    count = len(values)
    left = torch.linalg.qr(torch.randn(rows or count, count, generator=rng, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(count, count, generator=rng, dtype=torch.float64))[0]
    return left * torch.as_tensor(values, dtype=torch.float64) @ right.T


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_singular_values_on_every_cloud_and_is_certain_enough_to_be_used(case):
    vision, text = (compute_moments(rows).factor for rows in CASES[case](generator(0)))
    matrix = vision @ text.T
    expected = torch.linalg.svdvals(matrix).sum().item()
    found = find_polar_factor(matrix)
    assert abs(found.nuclear_norm - expected) <= found.error_bound < 1e-9 * expected


@pytest.mark.parametrize("decades", [0, 3, 6, 9, 12, 16])
def test_bound_is_honest_at_any_condition_number_and_tight_where_all_values_are_followed(decades):
    matrix = with_singular_values(torch.logspace(0, -decades, 80, dtype=torch.float64))
    expected = torch.linalg.svdvals(matrix).sum().item()
    found = find_polar_factor(matrix)
    assert abs(found.nuclear_norm - expected) <= found.error_bound < (2e-10 if decades <= 6 else 1e-7) * expected


def test_tall_wide_and_scaled_matrices_have_the_norm_of_their_singular_values():
    values = torch.linspace(1, 5, 12, dtype=torch.float64)
    tall = with_singular_values(values, rows=40)
    for matrix, expected in ((tall, values.sum()), (tall.T, values.sum()), (tall * 1e-70, values.sum() * 1e-70)):
        found = find_polar_factor(matrix)
        assert found.factor.shape == matrix.shape
        assert found.nuclear_norm == pytest.approx(expected.item(), rel=1e-12)
        assert found.error_bound < 1e-10 * expected


@given(st.lists(st.floats(0.0, 1.0), min_size=2, max_size=12), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_bound_is_honest_for_any_singular_values(values, seed):
    matrix = with_singular_values(values, seed)
    found = find_polar_factor(matrix)
    if found is not None and found.error_bound < math.inf:
        assert abs(found.nuclear_norm - torch.linalg.svdvals(matrix).sum().item()) <= found.error_bound


def test_nothing_is_claimed_where_nothing_can_be_bounded():
    assert find_polar_factor(torch.zeros(5, 5, dtype=torch.float64)) is None
    assert find_polar_factor(torch.full((5, 5), float("nan"), dtype=torch.float64)) is None
