# SPDX-License-Identifier: Apache-2.0
"""Options as keyword arguments and as flags, one and the same."""

import inspect
from dataclasses import dataclass, field, fields

import pytest
from transformers import HfArgumentParser

from mir_callback import AtSteps, EveryEpochs, EverySteps, LogSpaced, MIRArguments, MIRConfig, PlateauRule, TimeShare
from mir_callback.config import FLAG_GROUPS, with_options
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
    assert (mir.probe_source().images, mir.probe_source().texts) == ("i", "t")
    assert mir.options()["every"] == EverySteps(20)
    assert mir.options()["stop"] == PlateauRule(window=6)


def test_every_option_is_a_flag_with_the_same_default():
    _, mir = parse()
    options = mir.options()
    assert options.pop("processor") is None
    assert MIRConfig(**options) == MIRConfig()
    named = {f"mir_{each.name}" for each in fields(MIRConfig)}
    assert named <= {each.name for each in fields(MIRArguments)}
    assert [each.name for group in FLAG_GROUPS for each in fields(group)] == [
        each.name for each in fields(MIRArguments)
    ]


@pytest.mark.parametrize(
    ("text", "every"),
    [
        ("50", EverySteps(50)),
        (20, EverySteps(20)),  # from a script's own configuration
        ("0.1ep", EveryEpochs(0.1)),
        ("log5", LogSpaced(5)),
        ("5%", TimeShare(0.05)),
        ("10, 100,1000", AtSteps((10, 100, 1000))),
        ("10,", AtSteps((10,))),
    ],
)
def test_schedules_as_words(text, every):
    assert MIRArguments(mir_every=text).options()["every"] == every
    assert MIRConfig(every=text).schedule == every


def test_values_that_stand_for_none():
    _, mir = parse("--mir_max_failures", "0", "--mir_watchdog_seconds", "0", "--mir_also_on", "none")
    assert mir.options()["max_failures"] is None
    assert mir.options()["watchdog_seconds"] is None
    assert mir.options()["also_on"] == ()
    assert MIRArguments(mir_also_on="start,save").options()["also_on"] == ("start", "save")
    assert MIRArguments(mir_stop="plateau", mir_stop_horizon=0).options()["stop"] == PlateauRule(horizon=None)


def test_a_saved_probe_takes_the_place_of_the_folders():
    _, mir = parse("--mir_probe", "probe.zip")
    assert mir.enabled
    assert mir.probe_source().probe == "probe.zip"


def test_switches_take_a_word_or_none():
    _, mir = parse("--mir_keep_best", "--mir_continue_after_stop", "False", "--no_mir_save_probe")
    given = {name: mir.options()[name] for name in ("keep_best", "continue_after_stop", "save_probe", "dry_run")}
    assert given == {"keep_best": True, "continue_after_stop": False, "save_probe": False, "dry_run": False}


def test_nothing_given_switches_mir_off():
    _, mir = parse()
    assert not mir.enabled
    assert mir.options()["stop"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mir_images", "i"], "images='i', texts=None"),
        (["--mir_texts", "t"], "images=None, texts='t'"),
        (["--mir_images", "i", "--mir_texts", "t", "--mir_probe", "p"], "either a probe, or images and texts"),
        (["--mir_probe", "p", "--mir_seed", "1"], "num_samples and seed"),
        (["--mir_stop", "soon"], "mir_stop.*'soon'"),
        (["--mir_every", "0"], "every.* 0"),
        (["--mir_every", "logs"], "every='logs'.*log5"),
        (["--mir_every", "200%"], "TimeShare.*2.0"),
        (["--mir_every", "0ep"], "EveryEpochs.* 0"),
        (["--mir_also_on", "stop"], "also_on.*stop"),
        (["--mir_root", "fast"], "root must be one of exact, paper_fast"),
        (["--mir_num_samples", "0"], "num_samples .* 0"),
        (["--mir_batch_size", "0"], "batch_size.* 0"),
        (["--mir_capture_budget_gb", "-1"], "capture_budget_gb.*-1"),
        (["--mir_stop", "plateau", "--mir_stop_min_delta", "-1"], "min_delta=-1"),
        (["--mir_watchdog_seconds", "0", "--mir_abort_on_hang"], "abort_on_hang.*watchdog_seconds"),
    ],
)
def test_error_names_the_option_when_a_flag_breaks_its_rule(words, message):
    with pytest.raises(ConfigError, match=message):
        parse(*words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evory": 3}, "'evory'.*every"),
        ({"xyz": 3}, "'xyz'.*root, standard_error"),
        ({"batch_size": 2}, "'batch_size'"),
        ({"stop": "soon"}, "stop.*none, observe, plateau.*'soon'"),
        ({"stop": PlateauRule}, "stop=.*PlateauRule"),
        ({"dry_run": "yes"}, "dry_run.*'yes'"),
        ({"max_failures": 0}, "max_failures.* 0"),
        ({"on_error": "stop"}, "on_error.*'stop'"),
    ],
)
def test_error_names_the_keyword_argument_that_breaks_its_rule(options, message):
    with pytest.raises(ConfigError, match=message):
        MIRConfig.from_options(options, groups=("measure", "when", "stop", "failures"))


def test_options_show_in_the_signature_of_a_function_that_takes_them():
    def function(model, *, seed=0, **options):
        return options

    shown = inspect.signature(with_options(function, groups=("memory",)))
    assert list(shown.parameters) == ["model", "seed", "batch_size", "capture_budget_gb"]
    assert shown.parameters["batch_size"].default == 4
