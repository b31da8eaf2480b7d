# SPDX-License-Identifier: Apache-2.0
"""MIR's flags beside a script's own, through HfArgumentParser."""

import dataclasses
from dataclasses import dataclass, field

import pytest
from transformers import HfArgumentParser

from mir_callback import AtSteps, EveryEpochs, LogSpaced, MIRArguments, PlateauRule, Probe, TimeShare
from mir_callback.errors import ConfigError
from mir_callback.launch import main, make_parser, read_flags, split
from tests.distributed.launch import run_process
from tests.samples import pairs


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


@pytest.mark.parametrize(
    ("text", "every"),
    [
        ("50", 50),
        (20, 20),  # from a script's own configuration
        ("0.1ep", EveryEpochs(0.1)),
        ("log5", LogSpaced(5)),
        ("5%", TimeShare(0.05)),
        ("10, 100,1000", AtSteps((10, 100, 1000))),
        ("10,", AtSteps((10,))),
    ],
)
def test_schedules_as_words(text, every):
    assert MIRArguments(mir_every=text).attach_options()["every"] == every


def test_events_and_dry_run_as_flags():
    _, mir = parse("--mir_also_on", "start,save", "--mir_dry_run")
    assert mir.attach_options()["also_on"] == ("start", "save")
    assert mir.attach_options()["dry_run"] is True
    assert MIRArguments().attach_options()["also_on"] == ("start", "end")
    assert MIRArguments(mir_also_on="none").attach_options()["also_on"] == ()
    assert read_flags(["--mir_dry_run"]).mir_dry_run is True
    assert read_flags(["--mir_dry_run", "false"]).mir_dry_run is False


def test_a_saved_probe_takes_the_place_of_the_folders():
    _, mir = parse("--mir_probe", "probe.zip")
    assert mir.enabled
    assert mir.attach_options()["probe"] == "probe.zip"


@pytest.mark.parametrize("read", [lambda words: parse(*words)[1], read_flags])
def test_switches_take_a_word_or_none(read):
    found = read(["--mir_keep_best", "--mir_continue_after_stop", "False"])
    assert found.mir_keep_best is True
    assert found.mir_continue_after_stop is False
    assert found.attach_options()["keep_best"] is True
    assert read(["--mir_continue_after_stop", "True"]).attach_options()["continue_after_stop"] is True


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
        (["--mir_stop", "soon"], "mir_stop must be one of none, observe, plateau, got 'soon'"),
        (["--mir_every", "0"], "every must be an integer of at least 1"),
        (["--mir_every", "logs"], "mir_every must be one of 50 .steps.*, got 'logs'"),
        (["--mir_every", "200%"], "TimeShare must get a part below 1, got 2.0"),
        (["--mir_every", "0ep"], "EveryEpochs must get a positive number"),
        (["--mir_also_on", "stop"], "also_on must be a collection of start, end, evaluate, save"),
        (["--mir_root", "fast"], "root must be one of exact, paper_fast"),
        (["--mir_num_samples", "0"], "num_samples must be an integer of at least 1"),
        (["--mir_batch_size", "0"], "batch_size must be an integer of at least 1"),
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


def test_the_launchers_flags_are_those_of_the_arguments():
    words = ["--mir_images", "a", "--mir_texts", "b", "--mir_every", "3", "--mir_stop", "plateau"]
    words += ["--mir_stop_min_delta", "0.1"]
    assert read_flags(words) == parse(*words)[1]
    assert read_flags([]) == MIRArguments()


def test_launcher_shows_its_three_uses_and_groups_of_flags_with_defaults(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    usage, _, rest = capsys.readouterr().out.partition("\n\n")
    assert [line.split()[:2] for line in usage.removeprefix("usage: ").splitlines()] == [
        ["python", "-m"],
        ["torchrun", "--nproc_per_node"],
        ["deepspeed", "--module"],
    ]
    for option in dataclasses.fields(MIRArguments):
        assert f"  --{option.name} " in rest
    assert {"the probe:", "the evaluations:", "stopping:"} <= set(rest.splitlines())
    assert "(default: 50)" in rest
    assert "None" not in rest


def test_launcher_without_arguments_shows_its_uses_and_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert said[:-1] == make_parser().format_usage().splitlines()
    assert said[-1].startswith("error: the script must follow --, got nothing;")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mir_images", "a"], "mir_texts must be given with mir_images"),
        ([], "mir_images and mir_texts, or mir_probe, must be given before --, got none"),
        (["--mir_images", "a", "--mir_texts", "b", "--mir_every", "0"], "every must be an integer of at least 1"),
        (["--mir_every", "often"], "mir_every must be one of 50 (steps), 0.1ep (epochs), log5 (per decade)"),
        (["--mir_evry", "3"], "unrecognized arguments: --mir_evry 3"),
        (["--mir_probe", "no.zip"], "path must be a saved probe, got no.zip, which does not exist"),
        (["--mir_images", "no", "--mir_texts", "no"], "images must be an existing folder, got no"),
    ],
)
def test_launcher_says_what_is_wrong_with_a_flag_in_one_line(tmp_path, capsys, words, message):
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('the script was started')")
    with pytest.raises(SystemExit) as ended:
        main([*words, "--", str(script)])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_launcher_says_so_when_nothing_was_measured(tmp_path):
    probe = Probe.from_pairs(pairs(2)).save(tmp_path / "probe.zip")
    script = tmp_path / "train.py"
    script.write_text("import sys; print('ran with', sys.argv[1:])")
    done = run_process(["-m", "mir_callback.launch", "--mir_probe", str(probe), "--", str(script), "--lr", "1"])
    assert done.returncode == 0
    assert "ran with ['--lr', '1']" in done.stdout
    assert f"[mir] WARNING: {script} ended without training a Trainer" in done.stderr
