# SPDX-License-Identifier: Apache-2.0
"""What NumPy computes for us agrees with PyTorch, at any shape."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mir_callback.metric import moments as linalg
from tests.clouds import generator


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_products_and_eigenvalues_equal_pytorchs_at_any_shape(n, d, seed):
    rows = normal(n, d, seed=seed)
    for given_rows in (rows, rows.T):
        found = linalg.gram(given_rows)
        assert torch.allclose(found, given_rows.T @ given_rows, atol=1e-12)
        assert torch.allclose(linalg.eigvalsh(found), torch.linalg.eigvalsh(found), atol=1e-12)
        values, vectors = linalg.eigh(found)
        assert torch.allclose(vectors * values @ vectors.T, found, atol=1e-12)
        assert torch.allclose(vectors.T @ vectors, torch.eye(len(values), dtype=torch.float64), atol=1e-12)


def test_gram_is_symmetric_to_the_last_bit():
    found = linalg.gram(normal(300, 70))
    assert torch.equal(found, found.T)
