# SPDX-License-Identifier: Apache-2.0
"""MIR's flags beside a script's own, through HfArgumentParser."""

from dataclasses import dataclass, field

import pytest
from transformers import HfArgumentParser

from llava_integration.launch import split
from mir_callback import MIRArguments, PlateauRule
from mir_callback.errors import ConfigError


@dataclass
class ScriptArguments:
    """A script's own flags."""

    model_name: str = field(default="tiny")


def parse(*words):
    return HfArgumentParser((ScriptArguments, MIRArguments)).parse_args_into_dataclasses(list(words))


def test_flags_stand_beside_the_scripts_own():
    script, mir = parse(
        *("--model_name", "big", "--mir_images", "i", "--mir_texts", "t", "--mir_every", "20"),
        *("--mir_stop", "plateau", "--mir_stop_window", "6"),
    )
    assert script.model_name == "big"
    assert mir.enabled
    assert mir.attach_options()["every"] == 20
    assert mir.attach_options()["stop"] == PlateauRule(window=6)


def test_a_saved_probe_takes_the_place_of_the_folders():
    _, mir = parse("--mir_probe", "probe.zip")
    assert mir.enabled
    assert mir.attach_options()["probe"] == "probe.zip"


def test_nothing_given_switches_mir_off():
    _, mir = parse()
    assert not mir.enabled
    assert mir.stop_rule() is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mir_images", "i"], "mir_texts must be given with mir_images, got mir_images='i' alone"),
        (["--mir_texts", "t"], "mir_images must be given with mir_texts"),
        (["--mir_images", "i", "--mir_texts", "t", "--mir_probe", "p"], "mir_probe must be given without mir_images"),
        (["--mir_stop", "soon"], "mir_stop must be one of none, plateau, got 'soon'"),
        (["--mir_every", "0"], "every must be an integer of at least 1"),
        (["--mir_root", "fast"], "root must be one of exact, paper_fast"),
        (["--mir_stop_min_delta", "-1"], "min_delta must be a positive number"),
    ],
)
def test_error_names_the_flag_when_it_breaks_its_rule(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(*words)


def test_launcher_splits_its_flags_from_the_script(tmp_path):
    script = tmp_path / "train.py"
    script.touch()
    ours, theirs = split(["--local_rank=1", "--mir_every", "3", "--", str(script), "--lr", "1", "--", "x"])
    assert ours == ["--mir_every", "3"]
    assert theirs == [str(script), "--lr", "1", "--", "x", "--local_rank=1"]


@pytest.mark.parametrize("words", [[], ["--mir_every", "3"], ["--"], ["--", "nowhere.py"]])
def test_error_when_the_launcher_finds_no_script(words):
    with pytest.raises(ConfigError, match="script"):
        split(words)
