# SPDX-License-Identifier: Apache-2.0
"""Norms, the 3-sigma rule and medians, whole and in shards."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mir_callback.metric import tokens
from mir_callback.metric.moments import compute_moments, compute_scatter, sum_rows
from mir_callback.metric.rate import replace_outliers
from mir_callback.metric.tokens import OutlierRule, bisect_lower_medians, compute_lower_medians, compute_row_norms
from tests import reference
from tests.clouds import CASES, generator

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("case", CASES)
def test_outliers_are_replaced_as_in_the_reference(case):
    rows, _ = CASES[case](generator(11))
    np.testing.assert_array_equal(replace_outliers(rows).numpy(), reference.without_outliers(rows.numpy()))


def test_outlier_cases_do_replace_rows():
    rows, _ = CASES["with_outliers"](generator(11))
    norms = compute_row_norms(rows)
    assert int(OutlierRule.from_norms(norms, torch.float64).outliers(norms).sum()) == 5


def test_outlier_rule_is_the_same_whatever_order_norms_come_in():
    norms = compute_row_norms(CASES["massive"](generator(1))[0])
    shuffled = norms[torch.randperm(len(norms), generator=generator(2))]
    assert OutlierRule.from_norms(norms, torch.float64) == OutlierRule.from_norms(shuffled, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 5, 100, 479, 480])
def test_lower_medians_equal_torch_median_to_the_last_bit(dtype, count):
    rows = torch.randn(count, 9, generator=generator(count)).to(dtype)
    rows[:, 0] = -3.0
    rows[:, 1] *= 1e-6
    rows[:, 2] *= 1e4
    others = torch.randn(7, 9, generator=generator(1)).to(dtype)
    first, second = bisect_lower_medians([rows, others], [count, 7], lambda counts: counts)
    assert torch.equal(first, rows.median(dim=0).values)
    assert torch.equal(second, others.median(dim=0).values)
    assert torch.equal(compute_lower_medians(rows), first)


@pytest.mark.parametrize("shape", [(5, 1), (1, 5), (700, 40)])
def test_lower_medians_leave_rows_as_they_are_and_do_not_depend_on_how_many_dimensions_go_together(shape, monkeypatch):
    rows = torch.randn(*shape, generator=generator(0))
    before, whole = rows.clone(), compute_lower_medians(rows)
    assert torch.equal(rows, before)
    monkeypatch.setattr(tokens, "_MEDIAN_ELEMENTS", 3 * len(rows))
    assert torch.equal(compute_lower_medians(rows), whole)
    assert torch.equal(whole, before.median(dim=0).values)


def test_medians_are_found_and_strictness_kept_where_only_deterministic_algorithms_are_allowed():
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        rows = torch.randn(9, 4, generator=generator(0))
        assert torch.equal(compute_lower_medians(rows), rows.median(dim=0).values)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1, max_size=30),
)
@settings(max_examples=200, deadline=None)
def test_lower_medians_equal_torch_median_for_any_finite_floats(values):
    rows = torch.tensor(values, dtype=torch.float32)[:, None]
    found = bisect_lower_medians([rows], [len(values)], lambda counts: counts)[0]
    assert float(found) == float(rows.median(dim=0).values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lower_medians_need_one_reduction_per_bit(dtype):
    calls = []
    rows = torch.randn(6, 3, generator=generator(0)).to(dtype)

    def count_calls(counts):
        calls.append(counts.shape)
        return counts

    bisect_lower_medians([rows, rows], [6, 6], count_calls)
    assert calls == [(2, 3)] * torch.finfo(dtype).bits


def test_sums_and_scatters_of_parts_add_up_to_those_of_the_whole():
    rows, _ = CASES["massive_constant"](generator(3))
    rows = rows.to(torch.bfloat16)
    parts = rows[:17], rows[17:17], rows[17:]
    mean = sum(sum_rows(part) for part in parts) / len(rows)
    scatter = sum(compute_scatter(part, mean) for part in parts)
    expected = np.cov(reference.to_numpy(rows), rowvar=False)
    np.testing.assert_allclose(scatter / (len(rows) - 1), expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(compute_scatter(rows, mean), scatter, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("case", ["equal", "few_rows", "rank_deficient"])
def test_moments_of_scaled_rows_have_their_covariance(case):
    rows, _ = CASES[case](generator(4))
    expected = np.cov(0.37 * rows.numpy(), rowvar=False)
    found = compute_moments(rows, 0.37)
    np.testing.assert_allclose(found.mean, 0.37 * rows.mean(dim=0), atol=1e-14)
    np.testing.assert_allclose(found.factor.T @ found.factor, expected, atol=1e-13 * np.abs(expected).max())
    assert found.trace.item() == pytest.approx(np.trace(expected))
    assert found.frobenius_norm.item() == pytest.approx(np.linalg.norm(expected))
