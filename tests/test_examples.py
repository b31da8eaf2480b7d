# SPDX-License-Identifier: Apache-2.0
"""The examples run as their headers say, at the size of their `--rehearse`."""

import json
import re

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
from wandb.sdk.lib import config_util

from mir_callback.history import read_history
from tests.distributed.launch import ROOT, run_process
from tests.training import wandb_file

pytestmark = pytest.mark.slow
SWEEP = yaml.safe_load((ROOT / "examples" / "sweeps" / "wandb_sweep.yaml").read_text())
# Start, peak, its step, end and its standard error.
COURSE = r"(\S+) +(\S+) \(step (\d+)\) +(\S+) \+- (\S+)"
DEMO = "examples/tiny_llava_pretrain.py"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Backbones, made by the first example and found by the others."""
    return tmp_path_factory.mktemp("cache")


def run_example(script, folder, cache, *arguments, environment=None):
    places = ["--rehearse", "--output", str(folder), "--cache", str(cache)]
    done = run_process([str(ROOT / "examples" / script), *places, *arguments], environment=environment, timeout=580)
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


def records_of(folder):
    return read_history(folder / "mir_history.jsonl")


def last_of(folder):
    return records_of(folder)[-1]


def course_of(folder):
    records = records_of(folder)
    peak = max(records, key=lambda record: record["mir"])
    ends = f"{records[-1]['mir']:.3f}", f"{records[-1]['mir_se']:.3f}"
    return f"{records[0]['mir']:.3f}", f"{peak['mir']:.3f}", str(peak["step"]), *ends


def headings_and_values(output):
    """Every heading of a run with the values said below it."""
    parts = re.split(r"^--- (.*)$", output.split("$ mir compare")[0], flags=re.MULTILINE)[1:]
    return [
        (title, re.findall(r"^\[mir\] step \d+: MIR (\S+)", lines, re.MULTILINE))
        for title, lines in zip(parts[::2], parts[1::2], strict=True)
    ]


def values_in(folder):
    return [f"{record['mir']:.4f}" for record in records_of(folder)]


@pytest.mark.parametrize("script", [DEMO, "examples/compare_captions.py", "examples/choose_learning_rate.py"])
def test_help_is_given_when_a_script_is_started_by_itself(script):
    done = run_process([script, "--help"])
    assert done.returncode == 0, done.stderr[-6000:]
    assert "--rehearse" in done.stdout


def test_torchrun_is_asked_for_when_the_demo_is_started_by_itself():
    done = run_process([DEMO, "--rehearse"])
    assert done.returncode == 2
    assert "start it with torchrun" in done.stderr


def test_weights_that_the_demo_leaves_have_the_value_it_measured_last(tmp_path, cache):
    places = ["--output", str(tmp_path), "--cache", str(cache)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = run_process([*torchrun, DEMO, "--rehearse", *places], timeout=580)
    assert "\nNext\n" in done.stdout, done.stderr[-6000:]  # not by its exit code, see run_ranks
    records = read_history(tmp_path / "mir_history.jsonl")
    lowest = min(records[1:], key=lambda record: record["mir"])
    assert re.search(
        rf"^ +MIR at its lowest +{lowest['mir']:.3f} \(step {lowest['step']}\)$", done.stdout, re.MULTILINE
    )
    following = done.stdout.split("\nNext\n")[1]
    assert f".venv/bin/mir report {tmp_path} " in following
    assert f".venv/bin/mir eval {tmp_path} " in following
    assert (ROOT / re.search(r"docs/\S+", following)[0]).is_file()
    again = run_process(["-m", "mir_callback", "eval", str(tmp_path), "--json"])
    assert again.returncode == 0, again.stderr[-6000:]
    measured = json.loads(again.stdout)
    assert measured["step"] == records[-1]["step"]
    assert measured["mir"] == pytest.approx(records[-1]["mir"], abs=1e-6)


def test_learning_rate_with_the_highest_vision_gain_is_chosen_among_those_not_given_up(tmp_path, cache):
    output = run_example("choose_learning_rate.py", tmp_path, cache)
    lasts = {float(folder.name.removeprefix("rate_")): last_of(folder) for folder in tmp_path.glob("rate_*")}
    assert sorted(lasts) == [1e-3, 3e-3, 1e-2, 3e-2]
    pattern = rf"^ +(\S+) +{COURSE} +(\S+) +(\S+) +(\d+)( +given up)?$"
    lines = re.findall(pattern, output, re.MULTILINE)
    assert [float(rate) for rate, *_ in lines] == sorted(lasts)
    for rate, *course, gain, loss, step, given_up in lines:
        last = lasts[float(rate)]
        assert tuple(course) == course_of(tmp_path / f"rate_{rate}")
        assert (gain, loss, int(step)) == (f"{last['vision_gain']:.2f}", f"{last['loss']:.3f}", last["step"])
        assert last["step"] == (2 if given_up else 4)
    said = headings_and_values(output)
    assert len(said) == 4
    for title, values in said:
        (rate,) = re.findall(r"^learning rate (\S+), seed 0, 4 steps$", title)
        assert values == values_in(tmp_path / f"rate_{rate}")
    finished = {float(rate): lasts[float(rate)]["vision_gain"] for rate, *_, given_up in lines if not given_up}
    assert len(finished) >= 2
    best = max(finished, key=lambda rate: finished[rate])
    assert f"Chosen: {best:g}, vision gain {finished[best]:.3f}\n" in output
    assert "Differences" in output.split("$ mir compare")[1]


def test_captions_are_compared_with_the_noise_of_their_seeds(tmp_path, cache):
    output = run_example("compare_captions.py", tmp_path, cache, "--seeds", "2")
    shown = re.findall(rf"^(short|long) +(\d) +{COURSE}$", output, re.MULTILINE)
    assert [(name, int(seed)) for name, seed, *_ in shown] == [("short", 1), ("long", 1), ("short", 2), ("long", 2)]
    lasts = {(name, seed): last_of(tmp_path / name / f"seed_{seed}") for name, seed, *_ in shown}
    for name, seed, *course in shown:
        assert tuple(course) == course_of(tmp_path / name / f"seed_{seed}")
    assert headings_and_values(output) == [
        (f"{name} captions, learning rate 0.003, seed {seed}, 4 steps", values_in(tmp_path / name / f"seed_{seed}"))
        for name, seed, *_ in shown
    ]
    compared = output.split("$ mir compare")[1]
    assert "paired by seed (1, 2)" in " ".join(compared.split())
    difference = sum((1 if name == "short" else -1) * last["mir"] / 2 for (name, _), last in lasts.items())
    shown = re.search(r"(short - long|long - short) +([+-][\d.]+) ", compared)
    assert float(shown[2]) == pytest.approx(difference if shown[1] == "short - long" else -difference, abs=6e-5)
    # The same projector and order of data for either mix: it is the captions that differ.
    for seed in "12":
        short, long = (
            read_history(tmp_path / name / f"seed_{seed}" / "mir_history.jsonl") for name in ("short", "long")
        )
        assert short[0]["mir"] == long[0]["mir"]
        assert short[-1]["mir"] != long[-1]["mir"]


def test_program_of_the_wandb_sweep_logs_its_metric_when_started_as_the_agent_does(tmp_path, cache):
    values = {"learning_rate": {"value": 0.0021}, "captions": {"value": SWEEP["parameters"]["captions"]["values"][1]}}
    assert sorted(values) == sorted(SWEEP["parameters"])
    parts = create_sweep_command_args({"args": values})
    parts |= {"env": [], "interpreter": [], "program": [SWEEP["program"]]}
    command = [word for part in create_sweep_command(SWEEP.get("command")) for word in parts[part[2:-1]]]
    config_util.save_config_file_from_dict(str(tmp_path / "config.yaml"), values)
    environment = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_RUN_ID": "fromagent",
        "WANDB_SWEEP_ID": "sweepid",
        "WANDB_SWEEP_PARAM_PATH": str(tmp_path / "config.yaml"),
    }
    assert command[0] == "examples/sweeps/train.py"
    run_example("sweeps/train.py", tmp_path / "runs", cache, *command[1:], environment=environment)
    rows = wandb_file.rows(tmp_path)
    (opened,) = (record.run for record in wandb_file.finished(tmp_path) if record.WhichOneof("record_type") == "run")
    assert json.loads(next(item for item in opened.config.update if item.key == "learning_rate").value_json) == 0.0021
    records = read_history(tmp_path / "runs" / "fromagent" / "mir_history.jsonl")
    metric = SWEEP["metric"]["name"]
    assert [row[metric] for row in rows if metric in row] == [record["mir"] for record in records]
    assert SWEEP["metric"]["goal"] == "minimize"
    summary = wandb_file.summary(tmp_path)
    assert summary[metric] == records[-1]["mir"]
    assert summary["mir_best"] == min(record["mir"] for record in records[1:])
