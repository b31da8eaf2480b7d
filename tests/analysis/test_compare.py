# SPDX-License-Identifier: Apache-2.0
"""Comparisons: against SciPy's tests, on simulated curves whose noise is known, and with what cannot be compared."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mir_callback import PlateauRule
from mir_callback.analysis.compare import Recipe, compare, find_stop
from mir_callback.analysis.curves import Point, build_curves, interpolate
from mir_callback.analysis.load import Run
from mir_callback.analysis.statistics import Difference, Noise, adjust_by_holm, find_differences, rank, standard_error
from mir_callback.analysis.tables import list_remarks, make_tables, state_verdict
from mir_callback.errors import ConfigError, HistoryError
from mir_callback.metric import influence
from mir_callback.record import as_records

# What benchmarks/seeds.py has trained: recipes with several runs that differ in the seed only.
REAL_SEEDS = Path(__file__).parents[2] / "benchmarks" / "results" / "seeds.json"
HOW = {
    "probe_fingerprint": "p",
    "prompt": "{image}{text}",
    "tokens_fingerprint": "t",
    "root": "exact",
    "num_samples": 50,
}
NEVER = PlateauRule(warmup=10**6)  # most of a comparison is the replay of its rule, which few tests look at
PSI = np.random.default_rng(7).normal(size=(9, 50))


def make_run(name, values, steps=None, **fields):
    """A run; a field that is a function is called with the number of the evaluation."""
    steps = range(0, 10 * len(values), 10) if steps is None else steps
    records = []
    for number, (step, mir) in enumerate(zip(steps, values, strict=True)):
        extra = {key: value(number) if callable(value) else value for key, value in fields.items()}
        records.append({"step": step, "mir": mir, **HOW, **extra})
    return Run(name, Path(name), Path(name), tuple(as_records(records)))


def falling(end, jitter=0.0, rng=None, count=30):
    at = np.arange(count) / (count - 1)
    noise = 0 if rng is None else rng.normal(0, jitter, count)
    return [float(v) for v in end + 1.5 * np.exp(-at / 0.15) + noise]


def seeds(name, ends, numbers=None):
    """A recipe whose runs end at these values, with these seeds, or (seed, data seed)."""
    runs = []
    for i, (end, number) in enumerate(zip(ends, numbers or [None] * len(ends), strict=True)):
        seed, data_seed = number if isinstance(number, tuple) else (number, None)
        runs.append(make_run(f"{name}{i}", falling(end), seed=seed, data_seed=data_seed))
    return Recipe(name, tuple(runs))


def difference(one, other, *seeds):
    """Of two recipes whose runs have these values and seeds."""
    points = [[Point(float(mir), None, None, True, 0) for mir in values] for values in (one, other)]
    (pair,) = find_differences(points, seeds, 0.05, [[True] * 2] * 2)
    return pair


def test_replicates_give_welchs_t_with_the_degrees_of_freedom_of_the_smaller_recipe():
    one, other = [3.0, 3.1, 3.05], [3.3, 3.2, 3.45, 3.26]
    result = compare([seeds("a", one), seeds("b", other)]).ranking
    expected = stats.ttest_ind(one, other, equal_var=False)
    (pair,) = result.pairs
    assert pair.value == pytest.approx(np.mean(one) - np.mean(other))
    assert pair.value / pair.se == pytest.approx(expected.statistic)
    assert pair.p == pytest.approx(2 * stats.t.sf(abs(expected.statistic), 2))
    assert (pair.seeds.kind, pair.probe.kind) == ("unpaired", "unknown")
    assert result.seed_stds == pytest.approx((np.std(one, ddof=1), np.std(other, ddof=1)))


def test_runs_of_the_same_seeds_give_the_paired_t_test():
    one, other = [3.0, 3.4, 2.7], [3.1, 3.52, 2.79]
    (pair,) = compare([seeds("a", one, [1, 2, 3]), seeds("b", other, [1, 2, 3])]).ranking.pairs
    expected = stats.ttest_rel(one, other)
    assert (pair.seeds.kind, pair.shared) == ("paired", ((1, None), (2, None), (3, None)))
    assert pair.p == pytest.approx(expected.pvalue)
    assert pair.differs
    assert not compare([seeds("a", one), seeds("b", other)]).ranking.pairs[0].differs


@given(st.lists(st.tuples(*[st.integers(0, 2000)] * 3), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_what_a_seed_adds_to_both_recipes_and_the_order_of_runs_change_no_paired_test(rows, random):
    one, other, added = np.array(rows).T / 1000
    numbers = [(n, None) for n in range(len(rows))]
    order = np.array(random.sample(range(len(rows)), len(rows)))
    mixed = [numbers[n] for n in order]
    plain = difference(one, other, numbers, numbers)
    moved = difference(one + added, other + added, numbers, numbers)
    assert (moved.value, moved.se) == pytest.approx((plain.value, plain.se))
    assert moved.shared == plain.shared == tuple(numbers)
    sorted_otherwise = difference(one[order], other, mixed, numbers)
    assert (sorted_otherwise.value, sorted_otherwise.p) == pytest.approx((plain.value, plain.p))
    swapped = difference(other, one, numbers, numbers)
    assert (swapped.value, swapped.p) == pytest.approx((-plain.value, plain.p))


def test_the_probes_error_is_that_of_paired_samples_when_influences_are_known():
    runs = [make_run(n, falling(3.0), influences=PSI[i].tolist(), mir_se=1.0) for i, n in enumerate("ab")]
    runs[1] = make_run("b", falling(3.3), influences=PSI[1].tolist(), mir_se=1.0)
    (pair,) = compare(runs).ranking.pairs
    paired = stats.ttest_rel(PSI[0], PSI[1])
    assert pair.probe.kind == "paired"
    assert pair.probe.se == pytest.approx(abs(np.mean(PSI[0] - PSI[1]) / paired.statistic))
    (given_std,) = compare(runs, seed_std=0.1).ranking.pairs
    assert given_std.se == pytest.approx(math.hypot(pair.probe.se, 0.1 * math.sqrt(2)))


def test_standard_error_is_that_of_the_metric():
    assert standard_error(PSI[0]) == pytest.approx(
        influence.compute_standard_error(torch.from_numpy(PSI[0])).item(), rel=1e-14
    )


def test_unpaired_errors_are_used_and_told_when_influences_are_missing():
    result = compare([make_run("a", falling(3.0), mir_se=0.03), make_run("b", falling(3.5), mir_se=0.04)]).ranking
    assert (result.pairs[0].probe.kind, result.pairs[0].probe.se) == ("unpaired", pytest.approx(0.05))
    assert any("influences" in sentence for sentence in result.messages)


def test_how_it_was_tested_is_said():
    def said(*recipes, **options):
        return "; ".join(compare(recipes, **options).ranking.messages)

    a, b, alone = seeds("a", [3.0, 3.1], [1, 2]), seeds("b", [3.2, 3.4], [1, 2]), seeds("c", [3.3])
    assert "paired by seed (1, 2): a - b" in said(a, b)
    assert "paired by seed (1, 2, without runs of other seeds): a - c" in said(
        a, seeds("c", [3.0, 3.3, 3.5], [2, 1, 3])
    )
    assert "two seeds in common (data seed included): a - c" in said(a, seeds("c", [3.0, 3.3], [2, 3]))
    assert "b is not paired by seed: the seed of b0 is unknown" in said(a, seeds("b", [3.2, 3.4]))
    assert "b is not paired by seed: b0, b1 have the same seed, 2" in said(a, seeds("b", [3.2, 3.4], [2, 2]))
    assert "not tested" not in said(a, b)
    assert "moves MIR: c; only replicates" in said(a, alone)
    assert "the largest SD between seeds here is 0.14, of b" in said(a, b, alone)
    assert said(a, b, seed_std=0.5).startswith("SD between seeds 0.5, as given")


def test_only_what_is_the_same_seed_and_data_seed_is_paired():
    def shared(one, other):
        return compare([seeds("a", [3.0, 3.1], one), seeds("b", [3.2, 3.4], other)], rule=NEVER).ranking.pairs[0].shared

    assert shared([(1, 5), (2, 6)], [(2, 6), (1, 5)]) == ((1, 5), (2, 6))
    assert shared([(1, 5), (2, 6)], [(1, 6), (2, 5)]) == shared([(1, 5), (2, 6)], [1, 2]) == ()
    resumed = make_run("r", falling(3.0), seed=lambda number: 1 if number < 9 else 3)
    recipes = [Recipe("a", (resumed, make_run("s", falling(3.1), seed=2))), seeds("b", [3.2, 3.4], [1, 2])]
    result = compare(recipes).ranking
    assert result.pairs[0].shared == ()
    assert "a is not paired by seed: the seed of r is 1, then 3" in result.messages


@given(st.floats(-2, 2), st.integers(1, 4), st.sampled_from([None, [1]]))
def test_a_single_run_is_never_told_from_anything(difference, count, numbers):
    alone = seeds("a", [3.0 + difference], numbers)
    others = seeds("b", [3.0 + 1e-3 * n for n in range(count)], list(range(1, count + 1)))
    found = compare([alone, others], rule=NEVER)
    (pair,) = found.ranking.pairs
    assert (pair.p, pair.se, pair.differs, found.ranking.ranks) == (None, None, False, (None, None))
    assert state_verdict(found).startswith("Undecided at step 290: a, b. Only replicates")
    assert [row[1] for row in make_tables(found)[0].rows] == ["-", "-"]


def test_recipes_of_one_run_stay_unranked_beside_others():
    found = compare([seeds("c", [1.0]), seeds("a", [3.4, 3.41, 3.42]), seeds("b", [3.0, 3.01, 3.02])])
    assert found.ranking.ranks == (None, 2, 1)
    assert state_verdict(found) == "Lowest MIR at step 290: b. Not tested, with one run only: c."
    assert [row[0] for row in make_tables(found)[0].rows] == ["b", "a", "c"]


def test_a_difference_says_which_noise_it_bears():
    runs = [make_run(n, falling(3.0), mir_se=0.03) for n in "a"] + [make_run("b", falling(3.4), mir_se=0.03)]
    (pair,) = compare(runs).ranking.pairs
    assert not pair.differs
    for factor, differs in ((0.99, True), (1.01, False)):
        assert compare(runs, seed_std=factor * pair.max_seed_std).ranking.pairs[0].differs is differs


@pytest.mark.parametrize("rho", [None, 0.0, 0.9])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_false_alarms_keep_to_the_level_when_only_the_seed_differs(count, rho):
    rng = np.random.default_rng(count)
    numbers = [None if rho is None else (n, None) for n in range(count)]
    shared, own = math.sqrt(rho or 0), math.sqrt(1 - (rho or 0))
    found = []
    for ratio in (1, 3, 10):
        for _ in range(1000):
            one, other = shared * rng.normal(size=count) + own * rng.normal(size=(2, count))
            found.append(difference(one, ratio * other, numbers, numbers).differs)
    assert np.mean(found) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(found))


@pytest.mark.parametrize("size", [2, 3])
def test_no_difference_is_found_in_nine_of_ten_of_real_trainings(size):
    rng = np.random.default_rng(0)
    found = []
    for name, kept in json.loads(REAL_SEEDS.read_text()).items():
        runs = [make_run(f"{name}{i}", mir, kept["steps"]) for i, mir in enumerate(kept["mir"])]
        for _ in range(25 if len(runs) >= 2 * size else 0):
            drawn = rng.permutation(len(runs))[: 2 * size]
            halves = [Recipe(n, tuple(runs[i] for i in part)) for n, part in zip("ab", np.split(drawn, 2), strict=True)]
            found.append(compare(halves, rule=NEVER).ranking.pairs[0].differs)
    assert len(found) >= 75
    assert np.mean(found) <= 0.1


def test_pairing_by_seed_finds_what_noise_hides_in_real_trainings():
    kept = json.loads(REAL_SEEDS.read_text())
    one, other = (
        Recipe(
            name,
            tuple(
                make_run(f"{name}{seed}", mir, kept[name]["steps"], seed=seed)
                for seed, mir in zip(kept[name]["seeds"], kept[name]["mir"], strict=True)
            ),
        )
        for name in ("base", "small_batch")
    )
    (pair,) = compare([one, other], rule=NEVER).ranking.pairs
    assert (len(pair.shared), pair.differs) == (5, True)
    blind = [[run.measured[-1].mir for run in recipe.runs] for recipe in (one, other)]
    assert not difference(*blind, [None] * 6, [None] * 5).differs


def test_a_real_difference_is_found_when_it_is_beyond_the_noise():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(50):
        ends = np.array([[3.0], [3.3]]) + rng.normal(0, 0.03, (2, 3))
        found.append(compare([seeds("a", ends[0]), seeds("b", ends[1])], rule=NEVER).ranking.ranks == (1, 2))
    assert np.mean(found) >= 0.9


def test_many_recipes_of_one_kind_are_all_equal_when_judged_together():
    rng = np.random.default_rng(5)
    wrong = 0
    for _ in range(20):
        groups = [seeds(str(k), 3 + rng.normal(0, 0.05, 4)) for k in range(6)]
        wrong += set(compare(groups, rule=NEVER).ranking.ranks) != {1}
    assert wrong <= 2


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_adjusted_p_keeps_order_and_never_falls(p_values):
    adjusted = adjust_by_holm(p_values)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    for (p, a), (q, b) in itertools.combinations(zip(p_values, adjusted, strict=True), 2):
        assert (p - q) * (a - b) >= 0
    assert min(adjusted) == min(1, len(p_values) * min(p_values))


def test_adjusted_p_is_as_holm_has_it():
    assert adjust_by_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_ranks_are_tied_where_noise_forbids_a_difference():
    def pair(one, other, value, differs):
        return Difference(one, other, value, Noise("unknown"), Noise("unpaired"), se=1.0, p=0.5, differs=differs)

    found = [pair(0, 1, -1.0, False), pair(0, 2, -2.0, True), pair(1, 2, -1.0, False)]
    assert rank(3, found) == [1, 1, 2]
    assert rank(3, [pair(0, 1, 1.0, True), pair(0, 2, -2.0, True), pair(1, 2, -3.0, True)]) == [2, 1, 3]


@pytest.mark.parametrize(
    ("field", "word"),
    [("probe_fingerprint", "probe"), ("prompt", "around"), ("tokens_fingerprint", "token ids"), ("root", "root")],
)
def test_values_of_other_definitions_are_refused_unless_told_to(field, word):
    runs = [make_run("a", falling(3.0)), make_run("b", falling(5.0), **{field: "another"})]
    with pytest.raises(HistoryError, match=rf"{field} \({word}.*in a; another in b.*--allow-mismatch"):
        compare(runs)
    found = compare(runs, allow_mismatch=True, seed_std=0.1)
    assert field in found.mismatch
    assert found.ranking.ranks == (1, 2)
    assert compare([runs[0], runs[0]]).mismatch is None


def test_an_older_run_without_its_prompt_is_compared_by_token_ids():
    older, newer = make_run("a", falling(3.0), prompt=None), make_run("b", falling(3.0))
    assert compare([older, newer]).mismatch is None
    with pytest.raises(HistoryError, match="tokens_fingerprint"):
        compare([older, make_run("c", falling(3.0), tokens_fingerprint="another")])


def test_influences_of_another_probe_are_not_paired():
    runs = [make_run(n, falling(3.0), influences=PSI[0].tolist(), mir_se=0.1) for n in "ab"]
    other = make_run("c", falling(3.2), influences=PSI[0].tolist(), mir_se=0.1, probe_fingerprint="q")
    kinds = [pair.probe.kind for pair in compare([runs[0], other], allow_mismatch=True).ranking.pairs]
    assert kinds == ["unpaired"]


def test_an_unknown_definition_is_refused():
    nothing = make_run("b", [3.0, 2.0], **dict.fromkeys(HOW))
    with pytest.raises(HistoryError, match="probe_fingerprint of b "):
        compare([make_run("a", falling(3.0)), nothing])


def test_other_circumstances_are_said():
    found = compare([make_run("a", falling(3.0), dtype="float32"), make_run("b", falling(3.0), dtype="bfloat16")])
    assert any("float32 in a; bfloat16 in b" in remark for remark in found.remarks)


def test_records_of_an_earlier_definition_are_left_out_and_told():
    mixed = make_run("a", falling(3.0), probe_fingerprint=lambda number: "old" if number < 4 else "p")
    found = compare([mixed, make_run("b", falling(3.0, count=31))])
    assert len(found.recipes[0].runs[0].records) == 26
    assert any("4 of 30 evaluations" in remark for remark in found.remarks)


def test_runs_without_common_steps_are_described_and_not_ranked():
    runs = [make_run("a", falling(3.0)), make_run("b", falling(2.0), steps=range(1000, 1300, 10))]
    found = compare(runs)
    assert found.ranking is None
    assert len(found.stops) == 2
    assert any("no step in common: a from 0 to 290; b from 1000 to 1290" in said for said in found.axes[0].messages)


def test_one_run_is_described():
    found = compare([make_run("a", falling(3.0))])
    assert found.ranking is None
    assert found.stops[0][0].end == 290


def test_runs_without_values_are_left_out_and_none_at_all_is_refused():
    failed = make_run("b", [None, None])
    found = compare([make_run("a", falling(3.0)), failed])
    assert [recipe.name for recipe in found.recipes] == ["a"]
    assert "skipped b" in found.remarks
    with pytest.raises(HistoryError, match="No run has a MIR"):
        compare([failed])


def test_shared_seeds_that_differ_the_other_way_than_all_runs_are_named():
    one, other = seeds("a", [3.0, 3.1, 3.05, 9.0], [1, 2, 3, 4]), seeds("b", [3.2, 3.31, 3.24, 1.0], [1, 2, 3, 5])
    result = compare([one, other], rule=NEVER).ranking
    assert result.pairs[0].value < 0
    assert any("the other way" in message for message in result.messages)


def test_equal_values_of_different_seeds_are_no_copy():
    found = compare([seeds("a", [3.0, 3.0], [1, 2]), seeds("b", [3.2, 3.3], [1, 2])], rule=NEVER)
    assert [len(recipe.runs) for recipe in found.recipes] == [2, 2]


def test_a_copy_of_a_run_is_no_replicate():
    twins = Recipe("a", (make_run("a1", falling(3.0)), make_run("a2", falling(3.0))))
    found = compare([twins, make_run("b", falling(3.4))])
    assert found.ranking.ranks == (None, None)
    assert any("skipped a2" in remark and "a1" in remark for remark in found.remarks)


def test_part_of_a_run_is_no_replicate_and_the_fuller_one_is_kept():
    values = falling(3.0)
    part = make_run("part", values[:20])
    whole = make_run("whole", values)
    for order in ((part, whole), (whole, part)):
        found = compare([Recipe("a", order), seeds("b", [3.2, 3.3])])
        assert [run.name for run in found.recipes[0].runs] == ["whole"]
        assert any("skipped part" in remark and "whole" in remark for remark in found.remarks)
    shared_start = [make_run("s1", [2.0, 5.0, 4.0]), make_run("s2", [2.0, 5.1, 4.1])]
    assert len(compare([Recipe("a", tuple(shared_start))]).recipes[0].runs) == 2


def test_one_run_in_two_recipes_is_told():
    run = make_run("x", falling(3.0))
    found = compare([Recipe("a", (run,)), Recipe("b", (run,))])
    assert "x and x are the same run, in both a and b" in found.remarks


def test_every_recipe_that_is_not_told_from_the_lowest_is_named():
    # A is uncertain; C is told from B and not from A.
    a, b, c = seeds("A", [0.8, 1.5, 1.1]), seeds("B", [1.31, 1.312, 1.314]), seeds("C", [1.61, 1.612, 1.614])
    found = compare([a, b, c])
    assert [pair.differs for pair in found.ranking.pairs] == [False, False, True]
    assert state_verdict(found) == "Lowest MIR at step 290: A; no difference beyond noise to B, C."


def test_time_is_left_out_of_the_tables_when_runs_of_one_recipe_were_not_equally_fast():
    def timed(name, pace):
        return make_run(name, falling(3.0 + pace / 100), train_seconds=lambda number: pace * number)

    even, uneven = (Recipe("a", (timed("x", 1.0), timed("y", pace))) for pace in (1.2, 9.0))
    other = Recipe("b", (timed("z", 3.0),))
    for recipe, doubtful in ((even, False), (uneven, True)):
        found = compare([recipe, other])
        (time,) = (result for result in found.axes if result.axis == "time")
        assert (time.doubt is not None) is doubtful
        assert (" s" in "".join(make_tables(found)[0].columns[5:])) is not doubtful
    assert any("9.0 times as long" in remark for remark in list_remarks(found))


def test_a_rule_looks_ahead_by_the_planned_length_that_the_trainer_saved():
    values = falling(3.0, count=60)
    planned = make_run("planned", values, max_steps=1000)
    bare = replace(make_run("bare", values), max_steps=1000)
    lost = make_run("lost", values)
    found = compare([planned, bare, lost])
    stops = [stop.step for (stop,) in found.stops]
    assert stops[0] == stops[1] is not None
    assert any(remark.startswith("lost: max_steps is unknown") for remark in found.remarks)
    assert not any(remark.startswith("bare: max_steps") for remark in found.remarks)


def test_steps_are_written_in_full():
    steps = [1_358_000, 1_358_030]
    found = compare([make_run(name, [3.0, 2.0 + n], steps) for n, name in enumerate("ab")])
    assert "at step 1358030" in state_verdict(found)


def test_each_axis_compares_at_its_own_last_common_position():
    small = make_run("a", falling(3.0), tokens_seen=lambda n: 100 * n, samples_seen=lambda n: 40 * n)
    large = make_run("b", falling(3.0, count=40), samples_seen=lambda n: 80 * n, train_seconds=lambda n: 3.0 * n)
    small = Run(**{**vars(small), "tokens": tuple((10 * n, 100.0 * n) for n in range(30))})
    large = Run(**{**vars(large), "tokens": tuple((10 * n, 200.0 * n) for n in range(40))})
    found = {result.axis: result for result in compare([small, large], by="tokens").axes}
    assert set(found) == {"step", "tokens", "samples"}  # only one knows its time
    assert (found["step"].x, found["tokens"].x, found["samples"].x) == (290, 2900, 1160)
    (ours,), (theirs,) = found["tokens"].points
    assert (ours.measured, theirs.measured) == (True, False)
    assert theirs.mir == pytest.approx((large.records[14].mir + large.records[15].mir) / 2)
    assert theirs.step == pytest.approx(145)


def test_time_is_that_of_training_where_all_know_it_and_else_what_has_passed():
    clocks = {"train_seconds": lambda n: 2.0 * n, "elapsed": lambda n: 3.0 * n}
    both = [make_run("a", falling(3.0), **clocks), make_run("b", falling(3.1), **clocks)]
    mixed = [both[0], make_run("c", falling(3.1), elapsed=clocks["elapsed"])]
    assert [(r.clock, r.x) for r in compare(both).axes if r.axis == "time"] == [("train_seconds", 58)]
    assert [(r.clock, r.x) for r in compare(mixed).axes if r.axis == "time"] == [("elapsed", 87)]


@given(st.floats(0, 290))
def test_a_point_between_evaluations_lies_between_them_with_its_influences(position):
    influences = {number: PSI[number % 9] for number in range(30)}
    run = make_run("a", falling(3.0), influences=lambda n: influences[n].tolist(), mir_se=0.2)
    point = interpolate(build_curves("step", [run])[0], position)
    left, right = math.floor(position / 10), math.ceil(position / 10)
    ends = [run.records[left].mir, run.records[right].mir]
    assert min(ends) - 1e-12 <= point.mir <= max(ends) + 1e-12
    share = position / 10 - left
    assert np.allclose(point.influences, (1 - share) * influences[left] + share * influences[right])
    assert point.se == pytest.approx(0.2)


def test_the_stop_is_where_the_rule_stops_in_training():
    run = make_run("a", [*falling(3.0), None, *[3.0] * 9], train_seconds=lambda n: 4.0 * n)
    rule = PlateauRule()
    first = next(n for n in range(1, 41) if rule.verdict(run.records[:n]).stop)
    stop = find_stop(run.records, rule)
    assert stop.step == run.records[first - 1].step
    assert (stop.end, stop.saved_steps, stop.saved_seconds) == (390, 390 - stop.step, 4.0 * (40 - first))
    assert stop.saved_share == pytest.approx(stop.saved_steps / 390)
    assert stop.missed_gain == pytest.approx(run.records[first - 1].mir - 3.0)
    never = find_stop(make_run("b", [5 - 0.1 * n for n in range(30)]).records, rule)
    assert (never.step, never.saved_steps) == (None, 0)
    assert never.reason.startswith("going on: ")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"by": "epoch"}, "by .*'epoch'"),
        ({"at": -1.0}, "^at .*-1.0"),
        ({"at": math.nan}, "^at .*nan"),
        ({"at": 300.0}, "at=300 .*step 0 to 290"),
        ({"level": 0.0}, "^level .*0.0"),
        ({"seed_std": 0.0}, "^seed_std .*0.0"),
    ],
)
def test_options_are_refused_by_name(options, words):
    with pytest.raises(ConfigError, match=words):
        compare([make_run("a", falling(3.0)), make_run("b", falling(3.1))], **options)


def test_second_opinions_are_those_of_the_position_and_not_of_the_evaluation_before():
    steps = ([0, 1000], [0, 990])
    runs = [
        make_run(n, [3.0, 1.0], at, scale_free_mir=lambda i: 2.0 - i, vision_gain=lambda i: 2.0 * i)
        for n, at in zip("ab", steps, strict=True)
    ]
    table = make_tables(compare(runs, rule=NEVER))[0]
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert [rows["b"][name] for name in ("MIR", "scale-free MIR", "vision gain")] == ["1.0000", "1.0000", "2.0000"]
    assert [rows["a"][name] for name in ("MIR", "scale-free MIR", "vision gain")] == ["1.0200", "1.0100", "1.9800"]
