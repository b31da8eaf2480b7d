# SPDX-License-Identifier: Apache-2.0
"""The plateau rule on curves whose truth is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mir_callback import PlateauRule
from mir_callback.errors import ConfigError

RULE = PlateauRule(window=8, min_delta=0.02, warmup=5)


def history(values, every=50):
    return [{"step": index * every, "mir": value} for index, value in enumerate(values)]


def stops_at(rule, values):
    """Index of the evaluation at which a run with this curve would stop, or None."""
    for end in range(1, len(values) + 1):
        if rule.verdict(history(values[:end])).stop:
            return end - 1
    return None


def noise(seed, count, size):
    return size * np.random.default_rng(seed).standard_normal(count)


def test_stops_when_a_falling_curve_has_levelled_off():
    values = [2.0 + math.exp(-index / 6) for index in range(80)]
    stop = stops_at(RULE, values)
    # The true change over the window before the stop is below min_delta, and was not long before.
    assert values[stop - 7] - values[stop] < RULE.min_delta
    assert values[stop - 12] - values[stop - 5] > RULE.min_delta


@pytest.mark.parametrize("seed", range(20))
def test_stops_on_a_noisy_plateau(seed):
    values = [2.0 + math.exp(-index / 6) for index in range(120)] + noise(seed, 120, 0.003)
    stop = stops_at(RULE, values)
    assert stop is not None
    assert 15 <= stop <= 60


@pytest.mark.parametrize("seed", range(20))
def test_does_not_stop_before_the_fall_when_mir_rises_first(seed):
    # The shape of tiny models: up for 8 evaluations, then a long fall, then level.
    rise = np.linspace(2.2, 2.6, 9)
    fall = 1.8 + 0.8 * np.exp(-np.arange(100) / 10)
    values = np.concatenate([rise, fall]) + noise(seed, 109, 0.003)
    stop = stops_at(RULE, values)
    assert stop is not None
    assert values[stop] < 1.95


def test_does_not_stop_on_a_broad_flat_top_between_rise_and_fall():
    steps = np.arange(60)
    values = 2.5 - 0.0004 * (steps - 25.0) ** 2  # a hump whose top is flat within min_delta over the window
    rule = PlateauRule(window=8, min_delta=0.02, warmup=0)
    flat = rule.verdict(history(values[:30]))
    assert not flat.stop
    assert "flat, but" in flat.reason
    assert stops_at(rule, values) is None


@pytest.mark.parametrize("top", range(6, 16))
@pytest.mark.parametrize("curvature", [0.0008, 0.0017])
def test_does_not_stop_on_the_top_of_a_hump_whose_rise_lay_in_the_warm_up(top, curvature):
    values = [3 - curvature * (index - top) ** 2 for index in range(top + 25)]
    assert stops_at(RULE, values) is None


def test_does_not_stop_on_a_short_level_stretch_after_a_steep_rise():
    values = [2, 2.3, 2.6, 2.8, 2.95, *(3 + noise(0, 9, 0.002)), *(3 - 0.05 * index for index in range(30))]
    assert stops_at(RULE, values) is None


def test_a_damaged_order_of_steps_is_no_data():
    flat = history([2.0] * 20)
    assert RULE.verdict([*flat[:15], *flat[11:17]]).kind == "no data"


def test_stops_when_mir_rose_and_then_stays_up():
    values = [2.0 + 0.4 * (1 - math.exp(-index / 3)) for index in range(60)]
    assert stops_at(RULE, values) is not None


@given(st.floats(0.0006, 0.5), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_never_stops_on_a_steady_rise(slope, seed):
    values = 2.0 + slope * np.arange(60) + noise(seed, 60, slope / 10)
    assert stops_at(RULE, list(values)) is None
    assert RULE.verdict(history(list(values))).kind == "rising"


@given(st.floats(0.004, 0.5), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_never_stops_on_a_steady_fall(slope, seed):
    values = 50.0 - slope * np.arange(60) + noise(seed, 60, slope / 10)
    assert stops_at(RULE, list(values)) is None


@pytest.mark.parametrize("seed", range(10))
def test_does_not_stop_when_noise_hides_the_trend(seed):
    values = 2.0 + noise(seed, 40, 0.1)
    assert stops_at(RULE, list(values)) is None


@given(st.lists(st.one_of(st.none(), st.just(math.nan), st.just(2.0)), max_size=40))
@settings(max_examples=200, deadline=None)
def test_never_stops_on_failed_evaluations_or_too_few_points(values):
    verdict = RULE.verdict(history(values))
    finite = [value for value in values[RULE.warmup :] if value == 2.0]
    if not values or values[-1] != 2.0 or len(finite) < RULE.window:
        assert verdict.kind == "no data"
    else:
        assert verdict.kind == "plateau"  # exactly flat, whatever gaps lie in between


def test_says_how_many_points_are_missing():
    assert RULE.verdict(history([2.0] * 7)).reason == "2 of 8 evaluations in the window, after 5 of warm-up"


def test_verdict_depends_on_the_history_only():
    values = list(2.0 + noise(0, 30, 0.001))
    assert RULE.verdict(history(values)) == RULE.verdict(history(values))
    assert PlateauRule() == RULE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 3}, "window must be an integer of at least 4 evaluations, got 3"),
        ({"window": 8.0}, "window must be an integer"),
        ({"warmup": -1}, "warmup must be an integer of at least 0 evaluations, got -1"),
        ({"min_delta": 0}, "min_delta must be a positive number of MIR, got 0"),
        ({"min_delta": math.nan}, "min_delta must be a positive number"),
        ({"min_delta": "small"}, "min_delta must be a positive number of MIR, got 'small'"),
    ],
)
def test_error_names_the_option_when_it_breaks_its_rule(options, message):
    with pytest.raises(ConfigError, match=message):
        PlateauRule(**options)
