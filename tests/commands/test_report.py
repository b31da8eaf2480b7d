# SPDX-License-Identifier: Apache-2.0
"""`mir report`, from real runs on disk to the page."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from mir_callback import MIRCallback, PlateauRule, Probe
from mir_callback.analysis import load
from mir_callback.cli import arguments, report
from mir_callback.fs import write_atomic
from tests.analysis.pages import parse, records
from tests.commands.running import run_command
from tests.samples import pairs
from tests.training.runs import make_trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two real runs that differ in their learning rate, with the Trainer's checkpoints, and the probe."""
    root = tmp_path_factory.mktemp("report")
    probe = Probe.from_pairs(pairs(6, seed=3))
    for name, rate in (("slow", 1e-3), ("fast", 1e-2)):
        trainer = make_trainer(root / name, steps=6, learning_rate=rate, save_strategy="steps", save_steps=6)
        MIRCallback(probe, every=1, stop=PlateauRule(window=4, warmup=1, min_delta=1e-9)).attach(trainer)
        trainer.train()
        for file in (root / name / "checkpoint-6").iterdir():
            if file.name != "trainer_state.json":
                file.unlink()
    return root


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    for name in ("slow", "fast"):
        shutil.copytree(trained / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


mir = partial(run_command, "report")


def page(path="slow/mir_report.html"):
    with open(path, encoding="utf-8") as file:
        return parse(file.read())


def history(run):
    return [json.loads(line) for line in (run / "mir_history.jsonl").read_text().splitlines()]


def data(tree):
    return json.loads(tree.one("script", id="data").text)


def test_page_of_a_run_lies_in_its_folder(runs, capsys):
    status, said, error = mir(capsys, "slow")
    assert (status, error) == (0, "")
    assert said.strip() == f"wrote {os.path.join('slow', 'mir_report.html')}"
    (run,) = data(page())["runs"]
    expected = history(runs / "slow")
    assert run["name"] == "slow"
    assert run["steps"] == [record["step"] for record in expected] == list(range(7))
    assert [value.split()[0] for value in run["mir"]] == [f"{record['mir']:.3f}" for record in expected]
    state = json.loads((runs / "slow" / "checkpoint-6" / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert [float(loss) for loss in run["loss"][1:]] == pytest.approx(losses, rel=1e-3)
    assert "planned steps 6" in page().one("section", aria_labelledby="definition").words


def test_runs_are_laid_over_each_other_when_several_are_given(runs, capsys):
    status, _, error = mir(capsys, "slow", "fast", "-o", "out/both.html")
    assert (status, error) == (0, "")
    tree = page("out/both.html")
    assert [run["name"] for run in data(tree)["runs"]] == ["slow", "fast"]
    assert not tree.all("aside", "warning")
    first = tree.one("figure", "timeline")
    assert len(first.all("path", "loss")) == 2
    assert len(first.all("canvas")) == 2


def test_recipes_are_compared_on_the_page_and_share_a_colour(runs, capsys):
    for name in ("slow", "fast"):
        shutil.copytree(runs / name, runs / f"{name}_2")
        lines = [{**line, "mir": line["mir"] + 0.01 * (line["step"] > 0)} for line in history(runs / name)]
        (runs / f"{name}_2" / "mir_history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, said, error = mir(capsys, "slow=slow,slow_2", "fast=fast*")
    assert (status, said, error) == (0, "wrote mir_report.html\n", "")
    tree = page("mir_report.html")
    assert tree.one("h1").text == "slow, fast"
    names = ["slow: slow", "slow: slow_2", "fast: fast", "fast: fast_2"]
    assert [run["name"] for run in data(tree)["runs"]] == names
    comparison = tree.one("section", aria_labelledby="comparison")
    assert comparison.one("p", "verdict").text in (
        "Lowest MIR at step 6: fast.",
        "Lowest MIR at step 6: slow.",
        "No difference beyond noise at step 6: slow, fast.",
    )
    assert len(comparison.all("table")) == 3
    styles = tree.one("style").text
    assert [f".run-{n}-colour {{ --run: var(--c{n // 2});" in styles for n in range(4)] == [True] * 4
    for line in (lines := history(runs / "fast")):
        line["probe_fingerprint"] = "another"
    (runs / "fast" / "mir_history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert mir(capsys, "slow", "fast")[0] == 0
    assert not page("mir_report.html").all("section", aria_labelledby="comparison")
    assert "do not compare" in page("mir_report.html").one("aside", "warning").text


def test_page_is_made_while_a_run_is_training(runs, capsys):
    """A last line half written, no Trainer's state yet."""
    shutil.rmtree(runs / "slow" / "checkpoint-6")
    file = runs / "slow" / "mir_history.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    status, _, said = mir(capsys, "slow")
    assert status == 0
    assert data(page())["runs"][0]["steps"] == list(range(6))
    assert "slow" in said
    (notes,) = page().all("aside", "notes")
    assert "damaged line" in notes.text
    file.write_bytes(b"")
    assert mir(capsys, "slow")[0] == 0
    assert "no value yet" in page().text


def test_a_run_that_cannot_be_read_is_told_and_the_others_are_shown(runs, capsys):
    status, _, error = mir(capsys, "slow", "nowhere")
    assert status == 0
    assert "nowhere" in error
    tree = page("mir_report.html")
    assert "nowhere" in tree.one("aside", "notes").text
    assert [run["name"] for run in data(tree)["runs"]] == ["slow"]


def test_samples_come_from_a_probe_in_the_folder_when_it_is_the_one_measured(runs, capsys):
    probe = Probe.from_pairs(pairs(6, seed=3))
    Probe.from_pairs(pairs(6, seed=4)).save(runs / "slow" / "a_other.zip")
    (runs / "slow" / "b_broken.zip").write_bytes(b"PK no archive")  # of no other name is any opened
    assert mir(capsys, "slow") == (0, f"wrote {os.path.join('slow', 'mir_report.html')}\n", "")
    assert len(page().one("section", aria_labelledby="samples").all("img")) == 6  # the run's own
    (runs / "slow" / "mir_probe.zip").unlink()
    assert mir(capsys, "slow") == (0, f"wrote {os.path.join('slow', 'mir_report.html')}\n", "")
    assert not [e for e in page().all("section") if e.attributes["aria-labelledby"] == "samples" and e.all("img")]
    probe.save(runs / "slow" / "probe")
    mir(capsys, "slow", "--probe", "slow/probe")
    assert len(page().one("section", aria_labelledby="samples").all("img")) == 6
    mir(capsys, "slow", "--no-probe")
    assert not page().all("ol", "samples") or not page().one("ol", "samples").all("img")
    status, _, error = mir(capsys, "slow", "--probe", "slow/a_other.zip")
    assert status == 0
    assert "slow/a_other.zip" in error
    assert "slow/a_other.zip" in page().one("aside", "notes").text


def test_a_link_in_place_of_the_page_is_replaced_and_not_followed(runs, capsys):
    for target in (runs / "precious", runs / "fast"):
        (runs / "precious").write_text("kept")
        (runs / "slow" / "mir_report.html").unlink(missing_ok=True)
        (runs / "slow" / "mir_report.html").symlink_to(target)
        before = sorted((runs / "fast").iterdir())
        assert mir(capsys, "slow")[0] == 0
        assert not (runs / "slow" / "mir_report.html").is_symlink()
        assert data(page())["runs"][0]["name"] == "slow"
        assert (runs / "precious").read_text() == "kept"
        assert sorted((runs / "fast").iterdir()) == before


def test_control_characters_of_names_and_errors_are_escaped(runs, capsys):
    name = "a\x1b[31m\u202eb"
    (runs / "slow").rename(runs / name)
    with (runs / name / "mir_history.jsonl").open("a") as file:
        file.write(json.dumps({"step": 900, "mir": None, "error": "x\x1b[2J\x9b"}) + "\n")
    status, said, error = mir(capsys, name, "fast", "-o", "page.html")
    assert status == 0
    text = (runs / "page.html").read_text()
    assert "a\\x1b[31m\\u202eb" in text
    assert "x\\u001b[2J" in text
    assert not [sign for sign in said + error + text if sign in "\x1b\x9b\u202e"]


def test_folder_names_are_text_when_they_look_like_html(runs, capsys):
    name = "<img src=x onerror=alert(1)>"
    (runs / "slow").rename(runs / name)
    assert mir(capsys, name)[0] == 0
    tree = page(f"{name}/mir_report.html")
    assert tree.one("h1").text == name
    assert tree.one("head").one("title").text == f"MIR of {name}"
    assert all(image.attributes["src"].startswith("data:") for image in tree.all("img"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        (["slow", "--probe", "nothing.zip"], "no probe at nothing.zip"),
        (["slow", "--probe", "p.zip", "--no-probe"], "exclude each other"),
        (["slow", "--watch", "0"], "--watch takes at least 1 second, got 0"),
        (["slow", "--watch", "nan"], "--watch takes at least 1 second, got nan"),
        (["slow", "-o", ""], "--output is empty"),
        (["slow", "-o", "fast"], "--output fast is a folder"),
        (["slow", "-o", "slow/mir_history.jsonl/page.html"], "page.html (--output)"),
    ],
)
def test_error_names_what_is_wrong(runs, capsys, arguments, message):
    before = sorted(path.relative_to(runs) for path in runs.rglob("*"))
    status, _, error = mir(capsys, *arguments)
    assert status == 2
    assert error.startswith("mir report: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.relative_to(runs) for path in runs.rglob("*")) == before


def test_page_follows_a_run_until_it_is_interrupted(tmp_path):
    lines = [json.dumps(record) + "\n" for record in records(3)]
    (tmp_path / "run").mkdir()
    file, made = tmp_path / "run" / "mir_history.jsonl", tmp_path / "run" / "mir_report.html"
    file.write_text(lines[0])
    errors = tmp_path / "errors"
    watching = subprocess.Popen(
        [sys.executable, "-m", "mir_callback", "report", "run", "--watch", "1"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=errors.open("wb"),
        # Of a test run in the background a shell has switched Ctrl-C off, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        for count in (1, 2, 3):
            wait_for(lambda count=count: made.exists() and len(data(page(made))["runs"][0]["steps"]) == count, watching)
            assert page(made).one("body").attributes["data-reload"] == "1.0"
            with file.open("a") as appended:
                appended.writelines(lines[count : count + 1])
        file.rename(file.with_suffix(".aside"))
        wait_for(lambda: b"no mir_history.jsonl" in errors.read_bytes(), watching)
        file.write_text("".join(lines) + '{"step": 30, "mi')
        watching.send_signal(signal.SIGINT)
        out, _ = watching.communicate(timeout=60)
    finally:
        watching.kill()
        watching.wait()
    assert watching.returncode == 0
    assert b"every 1 s until Ctrl-C" in out
    assert "data-reload" not in page(made).one("body").attributes
    assert sorted(path.name for path in made.parent.iterdir()) == [
        "mir_history.aside",
        "mir_history.jsonl",
        "mir_report.html",
    ]


def wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended"
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.1)


def test_a_disk_that_is_full_for_a_while_does_not_end_watching(runs, capsys, monkeypatch):
    written = []

    def pause(seconds):
        monkeypatch.setattr(arguments, "write_atomic", write_atomic if written else no_space)
        if written.append(seconds) or len(written) > 2:
            raise KeyboardInterrupt

    def no_space(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report.time, "sleep", pause)
    status, out, error = mir(capsys, "slow", "--watch", "1")
    assert (status, len(written)) == (0, 3)
    assert error.count("No space left on device") == 1
    assert out.endswith("wrote slow/mir_report.html\n")


@pytest.mark.parametrize("command", ["report", "compare", "probe", "eval"])
def test_a_name_that_the_system_refuses_ends_in_a_sentence(runs, capsys, command):
    name = f"./{300 * 'a'}"
    status, _, error = run_command(command, capsys, name)
    assert status == 2
    assert error.count("\n") == 1
    assert name.removeprefix("./") in error


@pytest.mark.parametrize("command", ["report", "compare"])
def test_a_run_that_may_not_be_read_is_left_out_with_a_note(runs, capsys, monkeypatch, command):
    def refuse(path):
        if "slow" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return find(path)

    find = load._find_history
    monkeypatch.setattr(load, "_find_history", refuse)
    status, _, error = run_command(command, capsys, "slow", "fast")
    assert status == 0
    assert "Permission denied: 'slow'" in error
