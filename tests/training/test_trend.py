# SPDX-License-Identifier: Apache-2.0
"""The robust line and its noise, against SciPy, closed forms and simulation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import linregress, theilslopes

from mir_callback import trend


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
    assert trend.residual_scatter(x, y - 100 * np.sin(x / 5000), 0.01) == pytest.approx(size, rel=0.03)


def test_scatter_of_a_straight_line_or_of_two_points_is_zero():
    x = np.array([0.0, 1, 5, 6, 10])
    assert trend.scatter(x, 3 * x) == pytest.approx(0, abs=1e-12)
    assert trend.scatter(x[:2], x[:2]) == 0


@given(st.integers(0, 10_000), st.integers(1, 60))
@settings(max_examples=40, deadline=None)
def test_the_median_is_numpys(seed, count):
    values = np.random.default_rng(seed).standard_normal(count)
    assert trend.median(values) == pytest.approx(np.median(values))


@given(st.integers(0, 10_000), st.integers(1, 80), st.sampled_from([0.0, 1.0, 7.5, 1000.0]))
@settings(max_examples=80, deadline=None)
def test_a_cell_holds_the_evaluations_of_its_part_of_the_run(seed, count, width):
    rng = np.random.default_rng(seed)
    steps, values = np.cumsum(rng.integers(1, 6, count)).astype(float), rng.standard_normal(count)
    segment = np.sort(rng.integers(0, 3, count))
    cells = trend.Cells(steps, values, segment, width)
    begin, end = sorted(rng.integers(0, count + 1, 2))
    x, y = cells.until(begin, end) if begin < end else ([], [])
    parts = {}
    for number in range(cells.first[cells.of[begin]] if begin < count else 0, end):
        part = np.ceil(steps[number] / width) if width else number
        parts.setdefault((segment[number], part), []).append(number)
    kept = list(parts.values()) if begin < end else []
    assert list(x) == pytest.approx([steps[each].mean() for each in kept])
    assert list(y) == pytest.approx([np.median(values[each]) for each in kept])


def test_a_cell_is_settled_when_the_next_evaluation_will_lie_behind_it():
    steps = np.array([0.0, 10, 20, 30, 40, 60, 80, 120])
    cells = trend.Cells(steps, steps, np.zeros(8, dtype=int), 50.0)
    assert [cells.settled(count) for count in range(1, 9)] == [1, 1, 1, 1, 1, 5, 5, 8]
    alone = trend.Cells(steps, steps, np.zeros(8, dtype=int), 0.0)
    assert [alone.settled(count) for count in range(1, 9)] == list(range(1, 9))


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
