# SPDX-License-Identifier: Apache-2.0
"""Real two-rank training under DDP and DeepSpeed ZeRO 0 to 3: unchanged by the callback, and measured right."""

import json

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from mir_callback import Probe, evaluate_mir
from mir_callback.cli import main
from mir_callback.history import read_history
from mir_callback.record import lowest_record
from tests import tiny_models
from tests.distributed.launch import run_process, run_ranks
from tests.distributed.train_worker import EVERY, NUM_SAMPLES, SETUPS, SMALL_BUDGET_GB, STEPS
from tests.samples import pairs

# DDP, ZeRO-2 and FSDP2 of all clients are in tests/matrix.
CASES = [pytest.param(name, marks=() if name in ("3", "3 bf16 checkpointing") else pytest.mark.slow) for name in SETUPS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run a setup once, with or without the callback; (folder, what the ranks wrote)."""
    done = {}

    def run(setup, watched):
        if (setup, watched) not in done:
            folder = tmp_path_factory.mktemp(f"{setup}-{watched}")
            done[setup, watched] = folder, run_ranks("tests.distributed.train_worker", folder, setup, watched)
        return done[setup, watched]

    return run


@pytest.fixture(scope="module")
def probe():
    return Probe.from_pairs(pairs(NUM_SAMPLES), matched=True)


@pytest.mark.parametrize("setup", CASES)
def test_training_is_the_same_to_the_last_bit(runs, setup):
    plain, watched = runs(setup, "off")[1], runs(setup, "on")[1]
    assert [entry[0] for entry in plain[0]["log"]] == list(range(1, STEPS + 1))
    for rank in (0, 1):
        for field in ("log", "weights", "optimizer", "rng"):
            assert watched[rank][field] == plain[rank][field], field
        # Hooks that transformers installs in the first forward are there before the first graph, which saves some.
        assert watched[rank]["graphs"] <= plain[rank]["graphs"]
        assert ("compiled" in setup) == (watched[rank]["graphs"] > 0)
    assert [record["step"] for record in watched[0]["history"]] == list(range(0, STEPS + 1, EVERY))


@pytest.mark.parametrize("setup", [case for case in CASES if "bf16" not in case.values[0]])
def test_value_equals_that_of_one_process_with_the_same_weights(runs, setup, probe):
    folder, (first, second) = runs(setup, "on")
    model, processor = tiny_models.llava(dropout=0.2)
    untrained = evaluate_mir(model, probe, processor=processor)
    assert first["history"][0]["mir"] == pytest.approx(untrained.mir, abs=1e-6)
    model.load_state_dict(torch.load(folder / "weights.pt"), strict=False)
    trained = evaluate_mir(model, probe, processor=processor, vision_gain=True)
    assert first["history"][-1]["vision_gain"] == pytest.approx(trained.vision_gain, abs=1e-6)
    assert first["history"][-1]["step"] == STEPS
    assert first["history"][-1]["mir"] == pytest.approx(trained.mir, abs=1e-6)
    assert first["history"][-1]["per_layer"] == pytest.approx(trained.per_layer, rel=1e-5)
    assert abs(trained.mir - untrained.mir) > 1e-3
    for ours, theirs in zip(first["history"], second["history"], strict=True):
        assert ours["mir"] == theirs["mir"]
        assert ours["num_vision_tokens"] == trained.num_vision_tokens
        assert ours["num_text_tokens"] == trained.num_text_tokens
        assert ours["tokens_fingerprint"] == trained.tokens_fingerprint


@pytest.mark.parametrize("setup", CASES)
def test_the_wrapped_model_gives_the_same_value(runs, setup):
    for rank in runs(setup, "on")[1]:
        # Batches of other sizes: in bfloat16 that moves the last digits of hidden states.
        assert rank["wrapped"] == pytest.approx(rank["history"][-1]["mir"], abs=1e-5 if "bf16" in setup else 1e-6)


@pytest.mark.parametrize(
    "setup", [pytest.param("2", marks=pytest.mark.slow), "3", pytest.param("3 gather", marks=pytest.mark.slow)]
)
def test_keeping_the_best_model_changes_nothing_and_keeps_its_weights(runs, setup):
    plain = runs(setup.removesuffix(" gather"), "off")[1]
    folder, watched = runs(setup, "best")
    for rank in (0, 1):
        for field in ("log", "weights", "optimizer", "rng"):
            assert watched[rank][field] == plain[rank][field], field
        assert set(watched[rank]["gathered"].values()) == {0}
    best = lowest_record(watched[0]["history"])
    kept = folder / "run" / "mir_best"
    assert json.loads((kept / "mir_best.json").read_text())["step"] == best.step
    if setup == "3":  # as DeepSpeed's shards, said before training
        assert "DeepSpeed shards" in (folder / "output.txt").read_text()
        done = run_process([str(kept / "zero_to_fp32.py"), str(kept), str(kept), "--max_shard_size", "1GB"])
        assert done.returncode == 0, done.stderr
        weights = torch.load(next(kept.glob("pytorch_model*.bin")))
        model, processor = tiny_models.llava(dropout=0.2)
        model.load_state_dict(weights, strict=False)
    else:
        model, processor = LlavaForConditionalGeneration.from_pretrained(kept), tiny_models.llava()[1]
    again = evaluate_mir(model, Probe.from_pairs(pairs(NUM_SAMPLES)), processor=processor)
    assert again.mir == pytest.approx(best.mir, abs=1e-6)


def test_mir_eval_of_zero3_shards_gives_the_value_measured_in_the_run(runs, probe):
    folder, watched = runs("3", "best")
    probe.save(folder / "probe.zip")
    best = lowest_record(watched[0]["history"])
    shards = folder / "run" / "mir_best" / f"global_step{best.step}"
    for model, history in ((shards.parent, "best.jsonl"), (shards, "shards.jsonl")):
        flags = ["--probe", str(folder / "probe.zip"), "--history", str(folder / history)]
        assert main(["eval", str(model), *flags, "--device", "cpu"]) == 0
        (record,) = read_history(folder / history)
        assert (record.step, record.mir) == (best.step, pytest.approx(best.mir, abs=1e-6))


@pytest.mark.parametrize("setup", [case for case in CASES if case.values[0].startswith("3")])
def test_zero3_weights_are_back_in_their_shards_after_every_evaluation(runs, setup):
    for rank in runs(setup, "on")[1]:
        assert set(rank["gathered"].values()) == {0}
        assert len(rank["gathered"]) == STEPS + 1


def test_zero3_weights_left_gathered_by_others_are_released_before_our_forwards(runs):
    for rank in runs("3", "on")[1]:
        gathered = rank["leftovers"]["gathered"]
        for budget in (None, SMALL_BUDGET_GB):
            assert gathered[f"left by others, {budget}"] > 0
            assert gathered[f"ours, {budget}"] == gathered[f"afterwards, {budget}"] == 0


def test_several_passes_give_the_same_value_under_zero3(runs):
    for rank in runs("3", "on")[1]:
        whole, parted = rank["leftovers"]["reports"]
        assert (whole["passes"], parted["passes"]) == (1, 2)
        assert parted["per_layer"] == whole["per_layer"]
        assert parted["influences"] == whole["influences"]


def test_zero3_prefetch_trace_is_that_of_a_run_without_it(runs):
    for watched in ("on", "off"):
        assert "Invalidate trace cache" not in (runs("3", watched)[0] / "output.txt").read_text()
