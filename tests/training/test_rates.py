# SPDX-License-Identifier: Apache-2.0
"""What docs/stopping.md promises of the default rule, on fewer runs than `benchmarks/plateau_rates.py` makes."""

import math
from pathlib import Path

import numpy as np
import pytest

from mir_callback import PlateauRule

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_the_truth_of_a_curve_is_what_its_formula_says():
    from plateau_curves import settled, straight_by

    # depth e^(-t/tau) (1 - e^(-0.1/tau)) = 0.01, solved for t.
    expected = -0.1 * math.log(0.01 / (1 - math.exp(-1)))
    assert settled(lambda t: np.exp(-t / 0.1), 0.01) == pytest.approx(expected, abs=1e-3)
    assert settled(straight_by(0.011), 0.01) == 1
    assert settled(straight_by(0.009), 0.01) == 0
    # Level on top of a hump, and falling only after it: the plateau is what comes last.
    assert settled(lambda t: np.where(t < 0.5, 1.0, np.maximum(1 - 5 * (t - 0.5), 0)), 0.01) == pytest.approx(
        0.7, abs=0.01
    )


@pytest.mark.parametrize(
    ("number", "runs"), [(0, 8), (1, 6), (2, 3), (3, 1), (4, 8)], ids=["44", "100", "400", "2000", "44 lasting"]
)
def test_false_stops_are_rare_and_stops_in_time_are_the_rule_however_often_mir_is_evaluated(number, runs):
    from plateau_curves import FALLING, SATURATING
    from plateau_runs import SETTINGS, pooled

    saturating, falling = pooled(PlateauRule(), SETTINGS[number], runs)
    assert (len(saturating), len(falling)) == (len(SATURATING) * runs, len(FALLING) * runs)
    assert sum(outcome.false for outcome in [*saturating, *falling]) <= 0.02 * len([*saturating, *falling])
    assert sum(outcome.in_time for outcome in saturating) >= 0.93 * len(saturating)


@pytest.mark.parametrize("setting", [(200, 0.003, 0, "log-spaced"), (100, 0.003, 0, "by a share of the time")])
def test_uneven_steps_are_judged_as_well(setting):
    from plateau_runs import Setting, pooled

    saturating, falling = pooled(PlateauRule(), Setting(*setting), 4)
    assert not any(outcome.false for outcome in [*saturating, *falling])
    assert sum(outcome.in_time for outcome in saturating) >= 0.9 * len(saturating)


@pytest.mark.parametrize("number", [0, 2])
def test_a_fall_after_a_planned_change_is_waited_for_and_found_to_end(number):
    from plateau_curves import PLANNED
    from plateau_runs import SETTINGS, planned_outcomes

    for name in PLANNED:
        known, unknown = (planned_outcomes(PlateauRule(), name, SETTINGS[number], 10, said) for said in (True, False))
        assert not any(outcome.false for outcome in known)
        assert sum(outcome.in_time for outcome in known) >= 7
        assert all(outcome.false for outcome in unknown)


def test_a_hasty_rule_fails_the_same_runs():
    from plateau_runs import STANDARD, pooled

    saturating, falling = pooled(PlateauRule(window=4, min_delta=0.2, warmup=0), STANDARD, 3)
    assert sum(outcome.false for outcome in [*saturating, *falling]) > 15
    saturating, _ = pooled(PlateauRule(min_delta=0.001), STANDARD, 3)
    assert sum(outcome.in_time for outcome in saturating) < 9


def test_stops_on_half_of_min_delta_and_not_on_twice_of_it():
    from plateau_curves import noise, straight_by
    from plateau_runs import STANDARD, records, stop_of

    t = np.arange(STANDARD.evaluations + 1) / STANDARD.evaluations
    for seed in range(5):
        rng = np.random.default_rng(seed)
        slow, fast = (
            stop_of(PlateauRule(), records(t, straight_by(fall)(t) + noise(rng, len(t), 0.003, 0)))
            for fall in (0.01, 0.04)
        )
        assert slow < 0.6
        assert fast == math.inf


def test_failed_evaluations_and_outliers_make_a_stop_later_but_not_false():
    from plateau_runs import STANDARD, pooled

    for spoil in ({"failed": 0.15}, {"spikes": 0.05}):
        saturating, falling = pooled(PlateauRule(), STANDARD, 4, **spoil)
        assert not any(outcome.false for outcome in [*saturating, *falling])
        assert sum(outcome.stop < math.inf for outcome in saturating) >= 0.9 * len(saturating)


@pytest.mark.parametrize(("shelf", "most"), [(0.05, 0), (0.1, 3)])
def test_does_not_stop_in_front_of_a_second_fall_that_comes_soon(shelf, most):
    from plateau_curves import noise, second_fall, settled
    from plateau_runs import STANDARD, records, stop_of

    t = np.arange(STANDARD.evaluations + 1) / STANDARD.evaluations
    rng, early = np.random.default_rng(0), 0
    for _ in range(12):
        curve = second_fall(rng, shelf)
        values = curve(t) + noise(rng, len(t), STANDARD.size, 0)
        early += stop_of(PlateauRule(), records(t, values)) < settled(curve, 0.02)
    assert early <= most


def test_a_steady_fall_under_noise_that_lingers_is_stopped_less_often_for_the_longer_line(monkeypatch):
    from plateau_curves import noise, straight_by
    from plateau_runs import records, stop_of

    from mir_callback import early_stopping as plateau

    def stops(fall, size, memory):
        rng, t = np.random.default_rng(3), np.arange(45) / 44
        made = [straight_by(fall)(t) + noise(rng, len(t), size, memory) for _ in range(20)]
        return sum(stop_of(PlateauRule(), records(t, values)) < math.inf for values in made)

    settings = ((0.03, 0.006, 0.5), (0.03, 0.01, 0.5), (0.04, 0.01, 0.8))
    most = (4, 7, 3)
    found = [stops(*setting) for setting in settings]
    assert all(count <= limit for count, limit in zip(found, most, strict=True)), found
    monkeypatch.setattr(plateau, "_BEND", -1.0)  # the longer line is never heard
    monkeypatch.setattr(plateau, "_BEND_IN_NOISE", -1.0)
    assert stops(*settings[1]) > found[1]
