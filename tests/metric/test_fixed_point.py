# SPDX-License-Identifier: Apache-2.0
"""Scatter in fixed point equals that in float64; the same integer products run on a CPU, only slowly."""

import pytest
import torch

from mir_callback.metric import moments
from mir_callback.metric.moments import compute_scatter_in_fixed_point, suits_fixed_point
from tests.clouds import CASES, generator

HALF = [torch.bfloat16, torch.float16]


def both(rows, mean=None):
    """Scatter of rows in fixed point and in float64, each divided by the spread of its two dimensions."""
    mean = rows.double().mean(dim=0) if mean is None else mean
    found = compute_scatter_in_fixed_point(rows, mean)
    centred = rows.double() - mean
    expected = centred.T @ centred
    spread = expected.diagonal().clamp_min(1e-300).sqrt()
    return found / spread / spread[:, None], expected / spread / spread[:, None]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_float64_on_every_cloud(case, dtype):
    for rows in CASES[case](generator(0)):
        found, expected = both(rows.to(dtype))
        assert (found - expected).abs().max() < 2e-7


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_constant_massive_and_minute_dimensions(dtype):
    rows = torch.randn(1001, 40, generator=generator(1))
    rows[:, 3] = 7.0
    rows[:, 5] = 0.0
    rows[:, 9] = 300.0 + rows[:, 9]
    rows[:, 11] *= 1e-4
    rows[:, 13] *= 1e3
    rows = rows.to(dtype)
    found = compute_scatter_in_fixed_point(rows, rows.double().mean(dim=0))
    assert found[3].abs().max() == 0.0
    assert found[5].abs().max() == 0.0
    found, expected = both(rows)
    assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize("count", [400, 4000, 40000])
def test_error_does_not_grow_with_the_number_of_rows(count):
    rows = torch.randn(40000, 32, generator=generator(2)).bfloat16()
    found, expected = both(rows[:count])
    assert (found - expected).abs().max() < 1e-7


def test_blocks_of_rows_add_up(monkeypatch):
    rows = torch.randn(333, 32, generator=generator(3)).bfloat16()
    whole, _ = both(rows)
    monkeypatch.setattr(moments, "_BLOCK_ROWS", 50)
    pieces, expected = both(rows)
    assert not torch.equal(whole, pieces)
    assert torch.allclose(pieces, expected, atol=1e-7)


def test_rows_about_another_mean_as_a_rank_has_it():
    rows = torch.randn(400, 32, generator=generator(4)).half()
    found, expected = both(rows, mean=torch.full((32,), 0.25, dtype=torch.float64))
    assert (found - expected).abs().max() < 1e-7


def test_only_half_precision_rows_on_a_gpu_are_taken():
    for dtype in (torch.float32, *HALF):
        assert not suits_fixed_point(torch.zeros(64, 64, dtype=dtype))
