# SPDX-License-Identifier: Apache-2.0
"""The robust line and its noise, against SciPy, closed forms and simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import linregress, theilslopes

from mir_callback import early_stopping as trend


@given(st.integers(0, 10_000), st.integers(2, 30))
@settings(max_examples=60, deadline=None)
def test_slope_is_scipys(seed, count):
    rng = np.random.default_rng(seed)
    x, y = np.cumsum(rng.uniform(0.1, 5, count)), rng.standard_normal(count)
    assert trend.theil_sen_slope(x, y) == pytest.approx(theilslopes(y, x).slope)


@pytest.mark.parametrize("size", [0.01, 1.0])
def test_scatter_is_the_noise_whatever_the_smooth_curve(size):
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.uniform(0.5, 1.5, 20_000))
    y = 100 * np.sin(x / 5000) + 0.01 * x + size * rng.standard_normal(len(x))
    assert trend.scatter(x, y) == pytest.approx(size, rel=0.03)
    assert trend.autocorrelated_scatter(x, y, 4) == pytest.approx(size, rel=0.1)
    assert trend.residual_scatter(x, y - 100 * np.sin(x / 5000), 0.01) == pytest.approx(size, rel=0.03)


def test_scatter_of_a_straight_line_or_of_two_points_is_zero():
    x = np.array([0.0, 1, 5, 6, 10])
    assert trend.scatter(x, 3 * x) == pytest.approx(0, abs=1e-12)
    assert trend.scatter(x[:2], x[:2]) == 0


def test_noise_that_lingers_counts_for_more():
    rng = np.random.default_rng(0)
    fresh, values = rng.standard_normal(50_000), np.zeros(50_000)
    for k in range(1, len(values)):
        values[k] = 0.6 * values[k - 1] + 0.8 * fresh[k]  # of variance 1
    x = np.arange(len(values), dtype=float)
    assert trend.scatter(x, values) < 0.7
    assert trend.autocorrelated_scatter(x, values, 4) > 1.15


def test_the_standard_error_of_a_slope_is_that_of_repeated_noise():
    rng, x = np.random.default_rng(0), np.arange(12.0)
    slopes = [trend.theil_sen_slope(x, rng.standard_normal(12)) for _ in range(4000)]
    assert 1 / trend.spread(x) == pytest.approx(np.std(slopes), rel=0.1)


@given(st.floats(0, 5), st.floats(0.001, 1), st.integers(4, 10))
@settings(max_examples=80, deadline=None)
def test_the_window_is_the_smallest_that_is_long_enough(noise, error, least):
    x = np.cumsum(np.random.default_rng(least).uniform(0.5, 1.5, 30))
    count = trend.window_for(x, noise, error, least, 25)
    assert least <= count <= 25
    reached = [k for k in range(least, 26) if noise <= error * trend.spread(x[-k:])]
    assert count == (reached[0] if reached else 25)


def test_the_paired_error_is_that_of_drawing_other_samples():
    rng, x = np.random.default_rng(0), np.arange(9.0)
    population = 0.5 * rng.standard_normal((1, 20_000)) + np.outer(x, rng.standard_normal(20_000))

    def draw():
        return population[:, rng.choice(20_000, 50)]

    slopes = [linregress(x, draw().mean(axis=1)).slope for _ in range(1500)]
    told = [trend.paired_error(x, draw()) for _ in range(200)]
    assert np.mean(told) == pytest.approx(np.std(slopes), rel=0.08)


def test_the_level_is_compared_with_the_lowest_half_window():
    y = np.array([5.0, 5, 1, 2, 5, 5, 4, 4, 4, 6])
    assert trend.level_above_best(y, 4) == pytest.approx(4.5 - 1.5)
    assert trend.level_above_best(y[-4:], 4) == pytest.approx(0.5)
