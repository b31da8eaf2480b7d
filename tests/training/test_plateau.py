# SPDX-License-Identifier: Apache-2.0
"""The plateau rule on curves whose truth is known."""

import json
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mir_callback import PlateauRule
from mir_callback.errors import ConfigError
from mir_callback.record import as_records

# Without the planned length of a run the horizon is the window's length.
RULE = PlateauRule(window=8, min_delta=0.02, warmup=5)

# MIR of the demo (examples/tiny_llava_pretrain.py) every 10 steps up to 800, when nothing stops it.
DEMO = [
    float(value)
    for value in """
    2.2677 2.3622 2.5938 2.8819 3.0360 3.0828 3.1017 3.0822 3.0404 2.9583 2.8485 2.7717
    2.6848 2.5788 2.5250 2.4758 2.3903 2.4239 2.3679 2.3201 2.3491 2.2821 2.2742 2.2152
    2.2380 2.2208 2.2198 2.1973 2.1830 2.1646 2.1628 2.1333 2.1686 2.1619 2.1592 2.1868
    2.1720 2.0986 2.1352 2.0788 2.1261 2.1029 2.1153 2.1341 2.1142 2.1063 2.1162 2.0885
    2.1301 2.1097 2.1058 2.0950 2.1471 2.1182 2.1449 2.1005 2.0758 2.1021 2.1008 2.0802
    2.0845 2.0899 2.0780 2.0864 2.0881 2.0790 2.0675 2.0670 2.0666 2.0716 2.0732 2.0723
    2.0739 2.0756 2.0777 2.0775 2.0767 2.0768 2.0767 2.0769 2.0769
    """.split()
]


def history(values, every=50, **fields):
    return [{"step": index * every, "mir": value, **fields} for index, value in enumerate(values)]


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
    found = [rule.verdict(history(values[:end])) for end in range(25, 36)]
    assert any("above its recent lowest" in verdict.reason for verdict in found)
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


@given(st.floats(0.002, 0.5), st.integers(0, 1000))
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
    elif values.count(2.0) < RULE.warmup + 2 * RULE.window:
        assert verdict.summary == "level, not fallen yet"
    else:
        assert verdict.kind == "plateau"  # exactly flat, whatever gaps lie in between


def test_says_how_many_points_are_missing():
    assert RULE.verdict(history([2.0] * 7)).reason == "2 of 8 evaluations in the window, after 5 of warm-up"


def test_verdict_depends_on_the_history_only():
    values = list(2.0 + noise(0, 30, 0.001))
    assert RULE.verdict(history(values)) == RULE.verdict(history(values))
    assert RULE.verdict(json.loads(json.dumps(history(values)))) == RULE.verdict(history(values))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 3}, "window=3"),
        ({"window": 8.0}, "window=8.0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"min_delta": 0}, "min_delta=0"),
        ({"min_delta": math.nan}, "min_delta=nan"),
        ({"min_delta": 1e308}, "min_delta=1e.308 is above 1000"),
        ({"min_delta": "small"}, "min_delta='small'"),
        ({"patience": 0}, "patience=0"),
        ({"patience_steps": -1}, "patience_steps=-1"),
        ({"horizon": 1.5}, "horizon=1.5"),
        ({"horizon": 0}, "horizon=0"),
        ({"horizon": "far"}, "horizon='far'"),
        ({"log_steps": 1}, "log_steps=1"),
        ({"observe_only": "yes"}, "observe_only='yes'"),
    ],
)
def test_error_names_the_option_when_it_breaks_its_rule(options, message):
    with pytest.raises(ConfigError, match=message):
        PlateauRule(**options)


def judged(rule, records):
    """Kind of every verdict of a run."""
    return [rule.verdict(records[:end]).kind for end in range(1, len(records) + 1)]


def test_the_demo_stops_on_its_lower_level_and_not_on_its_top():
    records = history(DEMO, every=10, max_steps=800)
    kinds = judged(PlateauRule(min_delta=0.04, patience=2), records)
    stop = kinds.index("plateau") * 10
    assert 400 <= stop <= 600
    assert np.mean(DEMO[stop // 10 - 7 : stop // 10 + 1]) - min(DEMO) < 0.06  # of a fall by more than one
    assert "rising" not in kinds  # it rises within the warm-up only


@pytest.mark.parametrize("horizon", [0.1, 0.2, 100, 250])
def test_the_expected_gain_is_what_a_straight_line_gives(horizon):
    values = [3 - 0.01 * index for index in range(60)]
    verdict = PlateauRule(horizon=horizon).verdict(history(values, max_steps=2000))
    steps = horizon if horizon >= 1 else horizon * 2000
    assert verdict.expected_gain == pytest.approx(0.01 * steps / 50)
    assert verdict.expected_gain_se == pytest.approx(0, abs=1e-9)
    assert f"in the next {steps:.0f} steps" in verdict.reason


def test_without_the_planned_length_of_a_run_the_window_is_the_horizon():
    values = [3 - 0.01 * index for index in range(60)]
    expected = RULE.verdict(history(values)).expected_gain
    assert expected == pytest.approx(0.01 * (RULE.window - 1))
    assert PlateauRule(window=8, horizon=None).verdict(history(values, max_steps=2000)).expected_gain == expected


def test_no_verdict_before_evaluations_span_the_horizon():
    values = [2.0] * 60
    kinds = judged(PlateauRule(warmup=0), history(values, max_steps=10_000))
    assert set(kinds[:20]) == {"no data"}  # 20 intervals of 50 steps are a tenth of the run
    assert "no data" not in kinds[25:]  # a tenth of the run and what is put together with the next ones
    assert (
        "span 950 steps, less than 1000" in PlateauRule(warmup=0).verdict(history(values[:20], max_steps=10_000)).reason
    )


def test_on_the_logarithm_of_the_step_a_logarithmic_fall_is_a_straight_line():
    values = [3 - 0.1 * math.log1p(50 * index) for index in range(60)]
    verdict = PlateauRule(horizon=260, log_steps=True).verdict(history(values))
    last = 50 * 59
    assert verdict.expected_gain == pytest.approx(0.1 * (math.log1p(last + 260) - math.log1p(last)))
    assert verdict.expected_gain_se == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("patience", [2, 3, 5])
def test_patience_in_evaluations_waits_for_the_same_finding(patience):
    values = list(2.0 + np.exp(-np.arange(60) / 4))
    first = stops_at(RULE, values)
    patient = PlateauRule(window=8, patience=patience)
    assert stops_at(patient, values) == first + patience - 1
    assert f"1 of {patience} evaluations" in patient.verdict(history(values[: first + 1])).reason


def test_patience_in_steps_waits_for_that_many():
    values = list(2.0 + np.exp(-np.arange(60) / 4))
    first = stops_at(RULE, values)
    patient = PlateauRule(window=8, patience_steps=120)
    assert stops_at(patient, values) == first + 3  # 150 steps: the first multiple of 50
    assert "100 of 120 steps" in patient.verdict(history(values[: first + 3])).reason


def test_a_failed_evaluation_starts_patience_anew():
    flat = history([2.0] * 30)
    patient = PlateauRule(window=8, patience=3)
    broken = [*flat[:28], {"step": 1390, "mir": None}, *flat[28:]]
    assert patient.verdict(flat).kind == "plateau"
    assert patient.verdict(broken).kind == "going on"


def test_observing_it_says_the_same_and_never_stops():
    values = list(2.0 + np.exp(-np.arange(60) / 4))
    watching = PlateauRule(window=8, observe_only=True)
    first = stops_at(RULE, values)
    assert stops_at(watching, values) is None
    verdict = watching.verdict(history(values[: first + 1]))
    assert verdict.would_stop
    assert not verdict.stop
    assert verdict.reason == RULE.verdict(history(values[: first + 1])).reason


def test_a_new_stage_starts_all_over():
    first, second = history([2.0] * 30, stage="projector"), history([2.0] * 50, stage="all")[30:]
    assert RULE.verdict(first).kind == "plateau"
    kinds = judged(RULE, [*first, *second])[30:]
    assert kinds == ["no data"] * 12 + ["going on"] * 8  # warm-up and window again, and it has not fallen yet
    unmarked = history([2.0] * 50)[30:]
    assert set(judged(RULE, [*first, *unmarked])[30:]) == {"plateau"}  # old records know of no stages


@given(st.integers(0, 1000), st.integers(20, 50))
@settings(max_examples=30, deadline=None)
def test_a_stage_is_judged_as_if_it_were_a_run_of_its_own(seed, before):
    values = 2.0 + noise(seed, 90, 0.01)
    records = [
        {"step": 50 * index, "mir": value, "stage": "a" if index < before else "b"}
        for index, value in enumerate(values)
    ]
    assert RULE.verdict(records) == RULE.verdict(records[before:])


def test_noise_that_hides_the_answer_is_told_from_a_fall():
    flat = 2.0 + noise(3, 40, 0.1)
    verdict = PlateauRule(min_delta=0.01).verdict(history(list(flat), max_steps=2000))
    assert verdict.kind == "too noisy"
    assert "evaluate more often, use more samples or a larger min_delta" in verdict.reason
    falling = flat - 0.2 * np.arange(40)
    assert PlateauRule(min_delta=0.01).verdict(history(list(falling), max_steps=2000)).kind == "going on"


@pytest.mark.parametrize("seed", range(10))
def test_more_noise_makes_the_window_longer(seed):
    def evaluations(size):
        reason = PlateauRule().verdict(history(list(2.0 + noise(seed, 60, size)), max_steps=2000)).reason
        return int(reason.split(" from ")[1].split()[0])

    assert evaluations(0.0005) == 7  # one and a half horizons
    assert 7 < evaluations(0.015) <= evaluations(0.1) == 3 * 7


def with_influences(values, influences):
    return [
        {**record, "influences": list(row), "probe_fingerprint": "p"}
        for record, row in zip(history(values, max_steps=2000), influences, strict=True)
    ]


def test_what_samples_have_in_common_does_not_count_and_how_they_differ_does():
    values = list(2.0 + noise(0, 40, 0.0005))
    own = 0.3 * np.random.default_rng(1).standard_normal(50)
    alone = PlateauRule().verdict(history(values, max_steps=2000))
    common = PlateauRule().verdict(with_influences(values, np.tile(own, (40, 1))))
    assert alone.kind == common.kind == "plateau"
    assert common.expected_gain_se == pytest.approx(alone.expected_gain_se)
    drifting = PlateauRule().verdict(with_influences(values, np.outer(np.arange(40), own)))
    assert drifting.kind != "plateau"
    assert drifting.expected_gain_se > 10 * alone.expected_gain_se


def test_influences_of_other_samples_are_left_out():
    values = list(2.0 + noise(0, 40, 0.0005))
    records = with_influences(values, np.outer(np.arange(40), noise(1, 50, 0.3)))
    records[-3]["probe_fingerprint"] = "q"
    alone = PlateauRule().verdict(history(values, max_steps=2000))
    assert PlateauRule().verdict(records) == alone
    records[-3]["probe_fingerprint"] = "p"
    assert PlateauRule().verdict(records) != alone
    records[-3]["influences"] = [math.nan] * 50
    assert PlateauRule().verdict(records) == alone


@pytest.mark.parametrize("seed", [0, 2, 4, 7, 8])
def test_a_level_stretch_within_the_noise_waits_for_the_longer_line_and_a_clear_bend_does_not(seed):
    # A fall by twice min_delta in a tenth of the run, level for the length of a window.
    index = np.arange(31)
    paused = 3 - 0.04 / 4.4 * np.minimum(index, 24) + noise(seed, 31, 0.006)
    verdict = PlateauRule().verdict(history(list(paused), max_steps=2200))
    assert verdict.kind == "going on"
    assert "from 14 values" in verdict.reason
    steeper = paused + np.maximum(0.1 * (24 - index), 0)
    assert PlateauRule().verdict(history(list(steeper), max_steps=2200)).kind == "plateau"


@st.composite
def histories(draw):
    """Of any density, with failures, influences, stages, changes of the plan and steps that may not increase."""
    rng, count = np.random.default_rng(draw(st.integers(0, 10_000))), draw(st.integers(1, 90))
    gaps = rng.integers(0 if draw(st.integers(0, 9)) == 0 else 1, draw(st.sampled_from([2, 10, 60])), count)
    steps, total = np.cumsum(gaps), draw(st.sampled_from([None, 500, 2000]))
    values = 2 + np.exp(-steps / 100) + draw(st.sampled_from([0, 0.003, 0.05])) * rng.standard_normal(count)
    change, with_influences = draw(st.integers(0, count)), draw(st.booleans())
    return [
        {
            "step": int(step),
            "mir": None if rng.random() < 0.05 else float(value),
            "max_steps": total,
            "stage": "a" if number < change else draw(st.sampled_from(["a", "b"])) if number == change else None,
            "next_drop": 300 if step <= 300 else None,
            "next_epoch": 150 if step <= 150 and change % 2 else None,
            "influences": rng.standard_normal(4).tolist() if with_influences else None,
        }
        for number, (step, value) in enumerate(zip(steps, values, strict=True))
    ]


@given(
    histories(),
    st.sampled_from([{}, {"horizon": None}, {"patience": 3}, {"patience_steps": 90}, {"warmup": 0, "window": 4}]),
)
@settings(max_examples=60, deadline=None)
def test_a_replay_gives_the_verdicts_of_the_run_which_knew_nothing_of_what_came_after(records, options):
    rule = PlateauRule(**options)
    assert list(rule.replay(records)) == [rule.verdict(records[:end]) for end in range(1, len(records) + 1)]


@pytest.mark.parametrize("known_from", range(40, 90))
def test_a_replay_gives_the_verdicts_of_a_run_whose_length_was_not_known_at_first(known_from):
    rule = PlateauRule(window=16)  # as a part of the run the horizon is as long as the window
    records = history(list(2 + np.exp(-np.arange(100) / 10) + noise(known_from, 100, 0.003)))
    for record in records[known_from:]:
        record["max_steps"] = 7500
    last = slice(known_from - 2, known_from + 4)
    expected = [rule.verdict(records[: end + 1]) for end in range(len(records))[last]]
    assert list(rule.replay(records))[last] == expected


def seconds(work):
    started = time.process_time()
    work()
    return time.process_time() - started


def test_the_work_of_a_replay_grows_with_the_evaluations_and_not_with_their_square():
    def records(count):
        values = 3 - np.arange(count) / count + noise(0, count, 0.003)
        return as_records(history(list(values), every=1, max_steps=count, influences=[0.1, -0.1]))

    rule, short, long = PlateauRule(), records(1000), records(8000)
    assert min(seconds(lambda: list(rule.replay(long))) for _ in range(2)) < 3
    rule.verdict(long)
    looks = [min(seconds(lambda some=some: rule.verdict(some)) for _ in range(3)) for some in (short, long)]
    assert looks[1] < 16 * looks[0] + 0.05


def slow_start(kind, count):
    t = np.arange(count + 1) / count
    fall = {
        "flat for 15 %": np.exp(-np.maximum(t - 0.15, 0) / 0.06),
        "flat for 30 %": np.exp(-np.maximum(t - 0.3, 0) / 0.06),
        "logistic": 1 / (1 + np.exp((t - 0.35) / 0.05)),
        "late logistic": 1 / (1 + np.exp((t - 0.6) / 0.04)),
        "rise, shelf": np.exp(-np.maximum(t - 0.15, 0) / 0.06) - 0.4 * np.exp(-t / 0.01),
    }[kind]
    return 3 + fall


@pytest.mark.parametrize("kind", ["flat for 15 %", "flat for 30 %", "logistic", "late logistic", "rise, shelf"])
@pytest.mark.parametrize("count", [20, 44, 100, 400, 2000])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_that_has_not_begun_to_fall_goes_on_however_often_it_is_evaluated(kind, count, seed):
    values = slow_start(kind, count) + noise(seed, count + 1, 0.003)
    records = history(list(values), every=2000 // count, max_steps=2000 // count * count)
    stop = next(
        (each["mir"] for each, said in zip(records, PlateauRule().replay(records), strict=True) if said.stop), 0
    )
    assert stop < 3.1  # nine tenths of the fall are done


@pytest.mark.parametrize("count", [44, 400])
def test_a_run_that_never_falls_is_stopped_late(count):
    records = history([2.0] * (count + 1), max_steps=50 * count)
    said = PlateauRule().verdict(records[: count // 2])
    assert not said.stop
    assert "MIR has not begun to fall" in said.reason
    stop = next(each["step"] for each, said in zip(records, PlateauRule().replay(records), strict=True) if said.stop)
    assert 0.6 <= stop / (50 * count) <= 0.65


def test_nothing_is_stopped_in_the_first_quarter():
    values = [2 + math.exp(-index) for index in range(101)]
    records = history(values, max_steps=5000)
    stop = next(each["step"] for each, said in zip(records, PlateauRule().replay(records), strict=True) if said.stop)
    assert 1250 <= stop <= 1350
    unplanned = PlateauRule(horizon=None).replay(records)  # nor is the warm-up a part of the run then
    assert next(each["step"] for each, said in zip(records, unplanned, strict=True) if said.stop) < 1250


def planned(values, field, *changes, every=50):
    """A history whose records say what lies ahead."""
    made = history(values, every=every, max_steps=every * (len(values) - 1))
    return [{**each, field: next((at for at in changes if at >= each["step"]), None)} for each in made]


def after_drops(t, *falls):
    return 2 + np.exp(-t / 0.04) - sum(by * (1 - np.exp(-np.maximum(t - at, 0) / fast)) for at, by, fast in falls)


@pytest.mark.parametrize("field", ["next_drop", "next_epoch"])
@pytest.mark.parametrize("count", [48, 96, 480])
def test_waits_for_what_the_plan_has_ahead_and_does_not_judge_across_it(field, count):
    t, every = np.arange(count + 1) / count, 9600 // count
    values = after_drops(t, (1 / 3, 0.1, 0.02), (2 / 3, 0.3, 0.02)) + noise(0, count + 1, 0.002)
    records = planned(list(values), field, 3200, 6400, every=every)
    said = list(PlateauRule().replay(records))
    stop = next(each["step"] for each, verdict in zip(records, said, strict=True) if verdict.stop)
    assert 6400 + 960 < stop <= 6400 + 2.5 * 960  # a horizon after the last change, not much more
    waiting = said[6400 // every]  # at the drop nothing of it can be seen yet
    assert waiting.kind == "going on"
    assert waiting.summary == "level, waits for step 6400"
    assert ("the learning rate will drop" in waiting.reason) == (field == "next_drop")
    hasty = PlateauRule(wait_for_schedule=False)
    bare = [{name: each[name] for name in ("step", "mir", "max_steps")} for each in records]
    assert list(hasty.replay(records)) == list(PlateauRule().replay(bare))
    assert any(verdict.stop for verdict in list(hasty.replay(records))[: 6400 // every])


def test_evaluations_before_a_drop_are_not_fitted_with_those_after():
    jump = [2.0] * 32 + [1.5] * 16  # level before and after it
    records = planned(jump, "next_drop", 1550)
    said = list(PlateauRule().replay(records))
    assert {verdict.expected_gain for verdict in said[32:] if verdict.expected_gain is not None} == {0.0}
    assert said[33].summary == "waiting (2 of 5)"
    assert "since the learning rate dropped at step 1550" in said[33].reason
    assert said[40].stop


def test_a_run_that_does_not_fall_after_its_last_drop_is_stopped_soon_after():
    values = after_drops(np.arange(49) / 48)
    records = planned(list(values), "next_drop", 800, 1600)
    stop = next(each["step"] for each, said in zip(records, PlateauRule().replay(records), strict=True) if said.stop)
    assert 1600 < stop <= 1600 + 0.15 * 2400
