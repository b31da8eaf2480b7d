# SPDX-License-Identifier: Apache-2.0
"""The evidence: its page follows from the raw values, and its figures mean what their names say."""

import json

import numpy as np
import pytest

from studies.decisions import analysis, evidence
from studies.decisions.analysis import Table
from studies.decisions.recipes import RECIPES, SEEDS

RUNS = json.loads(evidence.RAW.read_text(encoding="utf-8"))


def make_table(accuracy, **values):
    count = len(accuracy)
    names = [f"recipe {index}" for index in range(count)]
    return Table(names, ["data"] * count, [], np.array(accuracy, dtype=float), values)


def everyone(table, one, other):
    return True


def test_the_page_follows_from_the_raw_values():
    assert evidence.page(RUNS) == evidence.PAGE.read_text(encoding="utf-8"), (
        "run `python -m studies.decisions.evidence`"
    )


def test_the_readme_says_what_came_out():
    readme = (evidence.ROOT / "README.md").read_text(encoding="utf-8")
    assert evidence.readme_sentence(RUNS) in " ".join(readme.split())


def test_every_recipe_of_the_study_is_there_with_every_seed():
    there = {(run["recipe"], run["seed"]) for run in RUNS}
    assert there == {(recipe.name, seed) for recipe in RECIPES for seed in SEEDS}
    assert all((run["accuracy"] is not None) == evidence_scored(run["recipe"]) for run in RUNS)


def evidence_scored(name):
    return next(recipe for recipe in RECIPES if recipe.name == name).scored


def test_a_study_that_is_half_done_gives_a_page_of_what_is_there():
    some = {run["recipe"] for run in RUNS[::2]}
    half = [run for run in RUNS if run["recipe"] in some and not (run["recipe"] == "base" and run["seed"] == 1)]
    assert "base" not in analysis.tabulate(half).recipes
    page = evidence.page(half)
    assert "| MIR |" in page
    assert "a seed is missing: base." in page
    with pytest.raises(ValueError, match="no recipe has two seeds"):
        evidence.page([run for run in half if run["seed"] == 0])


@pytest.mark.parametrize(("order", "share"), [(1, 1.0), (-1, 0.0), (0, 0.5)])
def test_share_right_is_1_for_the_right_order_and_half_for_ties(order, share):
    accuracy = np.array([[0.1, 0.1], [0.5, 0.5], [0.9, 0.9]])
    table = make_table(accuracy)
    pairs = analysis.decided_pairs(table, everyone)
    assert sorted(pairs) == [(1, 0), (2, 0), (2, 1)]  # the better one first
    for single in (False, True):
        assert analysis.share_right(-order * accuracy, pairs, single) == share


def test_pairs_within_the_noise_of_seeds_are_left_out():
    noise = np.array([[-0.05, 0.0, 0.05]])
    table = make_table(np.array([[0.5], [0.55], [0.9]]) + noise)
    assert sorted(analysis.decided_pairs(table, everyone)) == [(2, 0), (2, 1)]


def test_noise_that_seeds_share_is_found_and_drops_out_of_a_paired_difference():
    rng = np.random.default_rng(0)
    recipes, shared, own = rng.normal(size=(40, 1)), rng.normal(size=(1, 400)), rng.normal(size=(40, 400))
    found = analysis.seeds_of(3 * recipes + 0.3 * shared + 0.1 * own)
    assert found.within == pytest.approx(np.hypot(0.3, 0.1), rel=0.1)
    assert found.shared == pytest.approx(0.9, abs=0.03)
    assert found.paired == pytest.approx(0.1 * np.sqrt(2), rel=0.05)
    assert found.between == pytest.approx(3 * recipes.std(ddof=1), rel=0.05)


def test_the_metric_that_decides_is_chosen_on_halves():
    rng = np.random.default_rng(0)
    accuracy = rng.random((20, 1)) + 1e-3 * rng.normal(size=(20, 3))
    table = make_table(accuracy, good=-accuracy, bad=rng.normal(size=(20, 3)))
    found = analysis.choose_on_halves(table, ["bad", "good"])
    assert (found.one, found.picks) == (1.0, {"good": 1.0})
    assert found.of["bad"] < 0.8


def test_what_the_page_calls_a_contradiction_is_what_a_run_would_have_been_told():
    sabotaged = [run for run in RUNS if run["recipe"] in ("all shuffled", "blank")]
    assert [evidence.contradicted(run) for run in sabotaged] == ["unused"] * len(sabotaged)
