# SPDX-License-Identifier: Apache-2.0
"""Loops that are no Hugging Face Trainer, as the examples write them: plain PyTorch, Accelerate, Lightning."""

import csv
import json
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mir_callback.record import as_records
from tests.distributed.launch import run_process, run_ranks
from tests.loops.running import EXAMPLES, SCRIPT, SOME_SLOW, STEPS, run

# What a line says of the run, and not of the clock.
SAID = ("step", "epoch", "mir", "mir_se", "per_layer", "loss", "loss_step", "max_steps", "verdict", "stage")


def said(records, first=0):
    return [[record[name] for name in SAID] for record in as_records(records) if record.step >= first]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return tmp_path_factory.mktemp("loops")


@pytest.fixture(scope="module")
def one_process(folders):
    """What each example leaves, with MIR and without, by its name; each is run once."""
    cache = {}

    def get(name, what):
        if (name, what) not in cache:
            cache[name, what] = run(name, folders / name / what, *SCRIPT[what])
        return cache[name, what]

    return get


REMEASURE = """
import sys
from transformers import LlavaForConditionalGeneration
from mir_callback import evaluate_mir
from tests.loops.running import example
module = example(sys.argv[1])
model, (_, processor) = LlavaForConditionalGeneration.from_pretrained(sys.argv[2]), module.make_model()
print(evaluate_mir(model, module.make_probe(), processor=processor).mir)
"""


@pytest.mark.parametrize("name", EXAMPLES)
def test_training_is_the_same_to_the_last_bit(one_process, name):
    plain, watched = one_process(name, "plain"), one_process(name, "watched")
    assert len(set(plain["losses"])) == STEPS
    for field in ("losses", "weights", "random", "flags"):
        assert watched[field] == plain[field], field


@pytest.mark.parametrize("name", EXAMPLES)
def test_lines_stand_at_the_steps_that_are_due_with_the_loss_of_that_step(one_process, name):
    watched = one_process(name, "watched")
    records = watched["history"]
    assert [record.step for record in records] == [0, 2, 4, STEPS]
    assert records[0].loss is None
    assert [record.loss for record in records[1:]] == pytest.approx([watched["losses"][k - 1] for k in (2, 4, STEPS)])
    assert {record.max_steps for record in records} == {STEPS}
    assert len({record.mir for record in records}) == 4


@pytest.mark.parametrize("name", EXAMPLES)
def test_value_is_that_of_evaluate_mir_on_the_same_weights(one_process, name):
    watched = one_process(name, "watched")
    assert watched["history"][-1].mir == pytest.approx(watched["mir"], abs=1e-6)


@pytest.mark.parametrize("name", SOME_SLOW)
def test_best_model_has_the_weights_of_the_lowest_value(one_process, folders, name):
    lowest = min(one_process(name, "watched")["history"][1:], key=lambda record: record.mir)
    best = folders / name / "watched" / "mir_best"
    assert json.loads((best / "mir_best.json").read_text())["step"] == lowest.step
    done = run_process(["-c", REMEASURE, name, str(best)])  # by itself, as the run was
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == pytest.approx(lowest.mir, abs=1e-6)


@pytest.mark.parametrize("name", SOME_SLOW)
def test_plateau_ends_training_and_a_resumed_run_stays_stopped(one_process, folders, name):
    stopped = one_process(name, "stopped")
    assert [record.step for record in stopped["history"]] == [0, 2, 4, 6, 8, 10]
    assert [record.verdict for record in stopped["history"][-2:]] == ["no data", "plateau"]
    assert len(stopped["losses"]) == 10
    again = run(name, folders / name / "stopped", *SCRIPT["stopped"], "--resume")
    assert again["history"] == stopped["history"]
    assert len(again["losses"]) == (0 if name == "lightning_module" else 1)  # which asks before a step, or after it


@pytest.mark.parametrize("name", EXAMPLES)
def test_resumed_run_continues_the_history(tmp_path, name):
    """From the checkpoint of step 10; Lightning begins the data anew in the middle of an epoch, the others do not."""
    whole = run(name, tmp_path / "whole", {}, "--steps", "13")
    for what in ("watched", "plain"):
        shutil.copytree(tmp_path / "whole", tmp_path / what)
    resumed = run(name, tmp_path / "watched", {}, "--steps", "13", "--resume")
    plain = run(name, tmp_path / "plain", None, "--steps", "13", "--resume")
    for field in ("losses", "weights", "random"):
        assert resumed[field] == plain[field], field
    assert [record.step for record in resumed["history"]] == [0, 2, 4, 6, 8, 10, 12, 13]
    assert resumed["history"][:6] == whole["history"][:6]
    if name == "lightning_module":
        assert [record.epoch for record in resumed["history"]] == [record.epoch for record in whole["history"]]
    else:
        assert resumed["losses"] == whole["losses"][10:]
        assert said(resumed["history"]) == said(whole["history"])


@pytest.fixture(scope="module")
def two_ranks(folders):
    """What each of two ranks found, by example and arguments."""
    return run_ranks("tests.loops.running", folders / "two")


@pytest.mark.parametrize("name", EXAMPLES)
def test_two_ranks_measure_the_same_and_stop_together(two_ranks, folders, name):
    first, second = (rank[name] for rank in two_ranks)
    for found in (first, second):
        watched, stopped = found["watched"], found["stopped"]
        assert len(set(watched["losses"])) == STEPS
        history = as_records(watched["history"])
        assert [record.step for record in history] == [0, 2, 4, STEPS]
        assert history[-1].mir == pytest.approx(watched["mir"], abs=1e-6)
        assert history[-1].world_size == 2
        assert len(stopped["losses"]) == 10
    assert first["watched"]["losses"] != second["watched"]["losses"]
    assert first["watched"]["weights"] == second["watched"]["weights"]
    assert (folders / "two" / name / "watched" / "mir_best" / "model.safetensors").is_file()


def test_records_are_the_same_on_every_rank_though_losses_and_clocks_are_not(two_ranks):
    first, second = (rank["history"] for rank in two_ranks)
    assert first == second
    assert first[1].loss == 0.0  # rank 0's


def scalars(folder, name):
    (found,) = {path.parent for path in folder.rglob("events.out.tfevents.*")}
    accumulator = EventAccumulator(str(found)).Reload()
    return {event.step: event.value for event in accumulator.Scalars(name)}


@pytest.mark.parametrize("name", ["plain_loop", "accelerate_loop"])
def test_values_stand_beside_the_loss_in_tensorboard(one_process, folders, name):
    watched = one_process(name, "watched")
    logged = scalars(folders / name / "watched", "mir")
    assert logged == {record.step: pytest.approx(record.mir) for record in watched["history"]}
    one_process(name, "plain")
    losses = scalars(folders / name / "plain", "loss")
    assert sorted(losses) == [1, 2, 3, 4, 5]
    assert scalars(folders / name / "watched", "loss") == losses


def csv_rows(folder):
    with open(folder / "version_0" / "metrics.csv") as file:
        return list(csv.DictReader(file))


def test_lightnings_own_rows_are_the_same_and_ours_stand_beside_them(one_process, folders):
    watched, _ = one_process("lightning_module", "watched"), one_process("lightning_module", "plain")
    plain_rows, rows = (csv_rows(folders / "lightning_module" / what) for what in ("plain", "watched"))
    assert [{key: row[key] for key in plain_rows[0]} for row in rows if not row["mir"]] == plain_rows
    assert len(plain_rows) == STEPS
    ours = {int(row["step"]): float(row["mir"]) for row in rows if row["mir"]}
    assert ours == {record.step: record.mir for record in watched["history"]}
