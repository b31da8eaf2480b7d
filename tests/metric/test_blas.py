# SPDX-License-Identifier: Apache-2.0
"""Products and factorisations agree with PyTorch's, share memory, and say when there is no factor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mir_callback.metric import linalg as blas
from tests.clouds import generator


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_products_and_factorisations_equal_pytorch_at_any_shape(m, k, n, seed):
    left, right = normal(m, k, seed=seed), normal(k, n, seed=seed + 1)
    assert torch.allclose(blas.product(left, right), left @ right, atol=1e-12)
    assert torch.allclose(blas.product(right.T, left.T), right.T @ left.T, atol=1e-12)
    assert torch.allclose(blas.gram(left), left.T @ left, atol=1e-12)
    assert torch.allclose(blas.singular_values(left), torch.linalg.svdvals(left), atol=1e-12)
    positive = left @ left.T + torch.eye(m, dtype=torch.float64)
    lower = blas.cholesky(positive)
    assert torch.equal(lower, lower.tril())
    assert torch.allclose(lower @ lower.T, positive)
    assert torch.allclose(blas.eigvalsh(positive), torch.linalg.eigvalsh(positive))
    values, vectors = blas.eigh(positive)
    assert torch.allclose(vectors * values @ vectors.T, positive)
    assert torch.allclose(vectors.T @ vectors, torch.eye(m, dtype=torch.float64), atol=1e-12)


def test_gram_is_symmetric_to_the_last_bit():
    found = blas.gram(normal(300, 70))
    assert torch.equal(found, found.T)


def test_no_cholesky_factor_when_a_matrix_is_not_positive_definite():
    assert blas.cholesky(torch.zeros(3, 3, dtype=torch.float64)) is None
    assert blas.cholesky(torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))) is None


@pytest.mark.parametrize("strict", [True, False])
def test_rows_that_want_gradients_are_measured_without(strict):
    rows = normal(9, 4).requires_grad_()
    with torch.inference_mode(strict):
        assert not blas.gram(rows).requires_grad
