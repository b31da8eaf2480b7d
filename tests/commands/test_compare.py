# SPDX-License-Identifier: Apache-2.0
"""`mir compare`, from real runs on disk to the files and the tables it leaves."""

import csv
import io
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import partial

import pytest

from mir_callback import MIRCallback, Probe
from tests.commands.running import run_command
from tests.samples import pairs
from tests.training.runs import make_trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Real runs: two seeds of either of two recipes, and one run on another probe."""
    folder = tmp_path_factory.mktemp("runs")
    recipes = {"a1": (1, 3e-3, 8), "a2": (2, 3e-3, 8), "b1": (1, 1e-2, 8), "b2": (2, 1e-2, 8), "other": (1, 3e-3, 6)}
    for name, (seed, rate, count) in recipes.items():
        options = {"learning_rate": rate, "include_num_input_tokens_seen": True, "seed": seed, "data_seed": 10 + seed}
        trainer = make_trainer(folder / name, steps=6, dropout=0.1, **options)
        MIRCallback(Probe.from_pairs(pairs(count)), every=1, batch_size=8).attach(trainer)
        trainer.train()
        trainer.save_state()
    return folder


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    copy = shutil.copytree(trained, tmp_path / "runs")
    monkeypatch.chdir(copy)
    return copy


mir = partial(run_command, "compare")


@contextmanager
def no_room_for_files():
    """Every write to a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def records_of(path):
    return [json.loads(line) for line in (path / "mir_history.jsonl").read_text().splitlines()]


def test_single_runs_decide_nothing_unless_the_noise_of_seeds_is_known(runs, capsys):
    status, said, _ = mir(capsys, "a1", "b1")
    assert status == 0
    assert "Undecided at step 6: a1, b1. Only replicates" in said
    assert "not tested" in said
    assert "Lowest MIR at step 6: " in mir(capsys, "a1", "b1", "--seed-std", "1e-4")[1]
    assert "No difference beyond noise at step 6: a1, b1." in mir(capsys, "a1", "b1", "--seed-std", "1e4")[1]


def test_recipes_with_other_seeds_are_not_paired_and_the_notes_say_so(runs, capsys):
    for line in (lines := records_of(runs / "b1")):
        line["seed"] = 7
    (runs / "b1" / "mir_history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, said, _ = mir(capsys, "a=a1,a2", "b=b1,b2")
    assert status == 0
    assert "not paired by seed, with fewer than two seeds in common (data seed included): a - b" in said


def test_recipes_are_ranked_with_tables_and_files_that_agree(runs, capsys):
    status, said, _ = mir(capsys, "a=a1,a2", "b=b1,b2", "--json", "c.json", "--csv", "c.csv", "--markdown", "c.md")
    assert status == 0
    found = json.loads((runs / "c.json").read_text())
    last = {name: records_of(runs / name)[-1] for name in ("a1", "a2", "b1", "b2")}
    by_step = found["axes"]["step"]
    means = {standing["recipe"]: standing["mir"] for standing in by_step["recipes"]}
    assert means["a"] == pytest.approx((last["a1"]["mir"] + last["a2"]["mir"]) / 2)
    assert means["b"] == pytest.approx((last["b1"]["mir"] + last["b2"]["mir"]) / 2)
    (pair,) = by_step["differences"]
    assert (pair["probe"]["kind"], pair["seeds"]["kind"], pair["shared"]) == ("paired", "paired", [[1, 11], [2, 12]])
    assert "paired by seed (1 with data seed 11, 2 with data seed 12): a - b" in said
    of_each = math.hypot(last["a1"]["mir_se"], last["b1"]["mir_se"])
    assert 0 < pair["probe"]["se"] < of_each
    both = [last[f"a{seed}"]["mir"] - last[f"b{seed}"]["mir"] for seed in (1, 2)]
    assert pair["seeds"]["se"] == pytest.approx(abs(both[0] - both[1]) / 2)
    assert set(found["axes"]) == {"step", "tokens", "samples", "time"}
    assert found["axes"]["samples"]["x"] == last["a1"]["samples_seen"] == 24
    lines = list(csv.DictReader(io.StringIO((runs / "c.csv").read_text())))
    assert [(line["recipe"], line["run"]) for line in lines] == [(name[0], name) for name in last]
    assert [float(line["mir_at_equal_step"]) for line in lines] == [last[line["run"]]["mir"] for line in lines]
    page = (runs / "c.md").read_text()
    for text in (found["verdict"], "| a - b |", f"{means['a']:.4f}", f"{means['b']:.4f}"):
        assert text in page
    for text in (found["verdict"], "a - b", f"{means['a']:.4f}", f"{means['b']:.4f}"):
        assert text in said


def test_a_pattern_names_the_runs_of_a_recipe(runs, capsys):
    _, said, _ = mir(capsys, "a=a*", "b1", "--json", "-")
    found = json.loads(said)
    assert [[run["name"] for run in recipe["runs"]] for recipe in found["recipes"]] == [["a1", "a2"], ["b1"]]


def test_checkpoints_are_compared_as_far_as_they_go(runs, capsys):
    (runs / "a1" / "checkpoint-3").mkdir()
    _, said, _ = mir(capsys, "a1/checkpoint-3", "b1", "--json", "-")
    found = json.loads(said)
    assert found["axes"]["step"]["x"] == 3
    assert [s["mir"] for s in found["axes"]["step"]["recipes"]] == [
        records_of(runs / n)[3]["mir"] for n in ("a1", "b1")
    ]


def test_another_probe_is_refused_unless_told_to_and_then_marked(runs, capsys):
    status, said, error = mir(capsys, "a1", "other")
    assert (status, said) == (2, "")
    assert error.startswith("mir compare: error: probe_fingerprint (probe)")
    assert error.count("\n") == 1
    status, said, _ = mir(capsys, "a1", "other", "--allow-mismatch", "--markdown", "c.md", "--csv", "c.csv")
    assert status == 0
    assert "NOT COMPARABLE, compared anyway" in said
    assert "NOT COMPARABLE, compared anyway" in (runs / "c.md").read_text()
    assert {line["comparable"] for line in csv.DictReader(io.StringIO((runs / "c.csv").read_text()))} == {"no"}


def test_what_cannot_be_read_is_left_out_and_told(runs, capsys):
    lines = (runs / "a2" / "mir_history.jsonl").read_text().splitlines()
    lines[2] = lines[2][:50]
    lines[3] = '{"step": 3, "mir": 1e400}'
    lines[4] = '{"step": 4, "mir": 2, "own": ' + 90 * "[" + 90 * "]" + "}"
    lines[5] = lines[5].replace('"loss":', '"own": 1' + 400 * "0" + ', "loss": 1' + 400 * "0" + ', "old": ')
    (runs / "a2" / "mir_history.jsonl").write_text("\n".join(lines))
    (runs / "empty").mkdir()
    (runs / "empty" / "mir_history.jsonl").touch()
    status, said, error = mir(capsys, "a1", "a2", "gone", "empty")
    assert status == 0
    assert "skipped: gone does not exist" in error
    assert [f"a2: skipped damaged line {line} " in said for line in (3, 4, 5)] == [True] * 3
    assert "a2: step 5: ignored loss=1000" in said
    assert "skipped empty" in said
    assert "Undecided at step 6: a1, a2." in said


def test_downloaded_artifacts_of_runs_are_compared(runs, capsys):
    for name in ("a1", "b1"):
        (runs / f"{name}-mir:v0").mkdir()
        for file in ("mir_history.jsonl", "mir_probe.zip"):
            shutil.copy(runs / name / file, runs / f"{name}-mir:v0")
    compared = [
        json.loads(mir(capsys, *names, "--json", "-")[1]) for names in (["a1", "b1"], ["a1-mir:v0", "b1-mir:v0"])
    ]
    differences = [found["axes"]["step"]["differences"] for found in compared]
    assert [{**pair, "one": "", "other": ""} for pair in differences[0]] == [
        {**pair, "one": "", "other": ""} for pair in differences[1]
    ]
    assert differences[1][0]["one"] == "a1-mir:v0"


def test_one_run_is_described(runs, capsys):
    status, said, _ = mir(capsys, "a1")
    assert status == 0
    assert "a1" in said
    assert "7   " in said
    assert "Lowest" not in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gone", "nothing"], "gone does not exist"),
        (["empty.jsonl"], "empty.jsonl"),
        (["a="], "'a='"),
        (["=a1"], "'=a1'"),
        (["x=a1", "x=a2"], "recipes are called x"),
        (["a1", "a2", "--rule", "speed=1"], "--rule has no option 'speed=1'"),
        (["a1", "a2", "--rule", "window=soon"], "--rule window=soon"),
        (["a1", "a2", "--rule", "log_steps=3"], "log_steps=3"),
        (["a1", "a2", "--rule", "window=1"], "window=1"),
        (["a1", "a2", "--at", "99"], "at=99"),
        (["a1", "--json", "-", "--csv", "-"], "can be '-'"),
        (["a1", "--json", "empty.jsonl/x.json"], "x.json (--json)"),
        (["a1", "--csv", "a2/mir_history.jsonl"], "--csv a2/mir_history.jsonl"),
        (["a1", "--csv", "."], "--csv . is a folder"),
        (["a1", "--markdown", ""], "--markdown needs the name of a file, got ''"),
        (["a1", "--markdown", "/dev/null"], "--markdown /dev/null"),
        ([""], "path is empty"),
        (["~nobody-of-this-name/run"], "~nobody-of-this-name/run does not exist"),
        (["long=" + ",".join(f"seed_{n}" for n in range(60)), "nowhere"], "nowhere does not exist"),
        (["a1", "a2", "--seed-std", "1e300"], "seed_std"),
        (["a1", "--rule", "min_delta=" + 400 * "9"], "--rule min_delta=9"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(runs, capsys, arguments, words):
    (runs / "empty.jsonl").touch()
    status, _, error = mir(capsys, *arguments)
    assert status == 2
    assert words in error.splitlines()[-1]
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_what_stood_in_an_output_stays_when_it_cannot_be_written(runs, capsys):
    (runs / "kept.csv").write_text("mine")
    with no_room_for_files():
        status, _, error = mir(capsys, "a1", "--csv", "kept.csv")
    assert status == 2
    assert "kept.csv (--csv)" in error
    assert (runs / "kept.csv").read_text() == "mine"
    assert sorted(path.name for path in runs.glob(".kept*")) == []


def test_two_outputs_in_one_file_are_refused(runs, capsys):
    (runs / "link").symlink_to("o")
    for other in ("o", "./o", "link"):
        status, _, error = mir(capsys, "a1", "--json", "o", "--csv", other)
        assert status == 2
        assert "--json and --csv" in error
        assert not (runs / "o").exists()


def test_links_are_followed_when_an_output_is_one(runs, capsys):
    (runs / "link.md").symlink_to("real.md")
    assert mir(capsys, "a1", "--markdown", "link.md")[0] == 0
    assert (runs / "link.md").is_symlink()
    assert "a1" in (runs / "real.md").read_text()


def test_names_that_are_no_text_are_written_all_the_same(runs, capsys):
    name = os.fsdecode(b"bad\xff\x1b[31m")
    (runs / "a1").rename(runs / name)
    status, said, _ = mir(capsys, name, "a2", "--csv", "c.csv", "--markdown", "c.md")
    assert status == 0
    assert "bad\\udcff\\x1b[31m" in said
    assert "\x1b" not in said
    assert "\x1b" not in mir(capsys, name, "a2", "--at", "99")[2]
    assert "bad\\udcff" in (runs / "c.csv").read_text()
    assert "\x1b" not in (runs / "c.csv").read_text()
    assert "\x1b" not in (runs / "c.md").read_text()


def test_a_checkpoint_that_is_a_link_is_one_of_the_run_it_lies_in(runs, capsys):
    (runs / "disk" / "elsewhere").mkdir(parents=True)
    (runs / "a1" / "checkpoint-3").symlink_to(runs / "disk" / "elsewhere")
    status, said, error = mir(capsys, "a1/checkpoint-3")
    assert status == 0, error
    assert "(step 3)" in said


@pytest.mark.parametrize("words", ["--help", "compare --help", "compare a1 b1"])
def test_what_is_slow_to_import_is_left_alone(runs, words):
    script = (
        f"import contextlib, sys\nfrom mir_callback.cli import main\n"
        f"with contextlib.suppress(SystemExit):\n    main({words.split()})\n"
        "print(sorted({'torch', 'transformers', 'wandb', 'matplotlib', 'scipy.stats'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["compare a1 a2", "report a1"])
def test_nobody_reading_on_is_no_error(runs, command):
    script = f"{sys.executable} -m mir_callback {command} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1, 141)  # 1 is what rich makes of it
    assert done.stderr == ""


def test_signs_that_a_terminal_lacks_are_replaced(runs):
    command = [sys.executable, "-m", "mir_callback", "compare", "a1", "a2"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert "Undecided at step 6" in done.stdout


def test_a_run_that_its_own_rule_ended_is_told(runs, capsys):
    lines = records_of(runs / "a1")
    lines[-1] |= {"verdict": "plateau", "reason": "level"}
    (runs / "a1" / "mir_history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "a1 was stopped by its stop rule at step 6" in mir(capsys, "a1")[1]


def test_an_axis_that_no_run_knows_ranks_nothing_and_says_so(runs, capsys):
    for name in ("a1", "a2"):
        lines = [{**line, "tokens_seen": None} for line in records_of(runs / name)]
        (runs / name / "mir_history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (runs / name / "trainer_state.json").unlink()
    status, said, _ = mir(capsys, "a1", "a2", "--by", "tokens")
    assert status == 0
    assert said.splitlines()[-1] == "No ranking by tokens; see the notes above."


def test_a_name_that_looks_like_markup_is_shown_as_it_is(runs, capsys):
    (runs / "a1").rename(runs / "[bold]a|1")
    _, said, _ = mir(capsys, "[bold]a|1", "a2", "--markdown", "c.md")
    assert "[bold]a|1" in said
    assert "\\[bold]a\\|1 |" in (runs / "c.md").read_text()


def test_the_command_runs_by_itself(runs):
    command = [
        sys.executable,
        "-m",
        "mir_callback",
        "compare",
        "a1",
        "b1",
        "--rule",
        "window=4,min_delta=5,warmup=1,horizon=None",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "window=4, min_delta=5" in done.stdout
    assert "step 4" in done.stdout
    assert "2 steps, 33%" in done.stdout
