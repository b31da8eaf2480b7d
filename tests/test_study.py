# SPDX-License-Identifier: Apache-2.0
"""The study behind docs/evidence.md still runs: one recipe, on backbones that are hardly trained."""

import dataclasses

import pytest

from studies.decisions.recipes import BASE


@pytest.mark.slow
def test_a_run_is_trained_measured_scored_and_found_again(tmp_path, monkeypatch):
    from studies.decisions import measure, stages, study, world

    small = {"hidden": 32, "layers": 2, "intermediate": 64, "vision_scenes": 64}
    settings = dataclasses.replace(world.SETTINGS, language_steps=2, vision_steps=2, **small)
    for module in (world, stages, measure):
        monkeypatch.setattr(module, "SETTINGS", settings)
    monkeypatch.setattr(world, "POOL", 200)
    monkeypatch.setattr(stages, "POOL", 200)
    monkeypatch.setattr(stages, "TUNING_STEPS", 4)
    recipe = dataclasses.replace(BASE, name="smoke", steps=33, shuffled=0.5, captions="detailed")
    monkeypatch.setattr(study, "BY_NAME", {recipe.name: recipe})
    monkeypatch.setattr(study, "RECIPES", (recipe,))
    study._set_up(tmp_path)
    study.run("smoke", 0, tmp_path)
    (found,) = study.collect(tmp_path)
    assert (found["recipe"], found["seed"], len(found["curve"])) == ("smoke", 0, stages.POINTS + 1)
    assert 0.0 <= found["accuracy"] <= 1.0
    assert found["fixed_accuracy"] is not None
    last, reference = found["curve"][-1], found["stage1"]
    assert last["captions"]["vision_gain"] == reference["captions_vision_gain"]
    monkeypatch.setattr(stages, "train", pytest.fail)  # a second time nothing is done again
    study.run("smoke", 0, tmp_path)
    assert study.collect(tmp_path) == [found]
