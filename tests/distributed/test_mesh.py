# SPDX-License-Identifier: Apache-2.0
"""Models split over ranks: the value is that of one process, or the run is refused by name on every rank."""

import functools

import pytest
import torch

from tests import tiny_models
from tests.distributed.launch import run_ranks
from tests.distributed.mesh_train_worker import NUM_SAMPLES, SETUPS
from tests.distributed.mesh_worker import COUNTS, FEW, GOOD, mixture, value
from tests.training.runs import ACCUMULATION, MICRO_BATCH


@pytest.fixture(scope="module", params=["2", "4 few", pytest.param("4", marks=pytest.mark.slow)])
def ranks(request, tmp_path_factory):
    processes, *which = request.param.split()
    folder = tmp_path_factory.mktemp("mesh")
    return run_ranks("tests.distributed.mesh_worker", folder, *which, processes=int(processes), timeout=240)


@pytest.fixture(scope="module")
def alone():
    return functools.cache(lambda build: [value(*build(), count) for count in COUNTS])


def test_value_is_that_of_one_process(ranks, alone):
    cases = ranks[0]["good"]
    assert cases.keys() in (GOOD.keys(), GOOD.keys() & FEW)
    for case in cases:
        known = alone(mixture if case == "by_experts" else tiny_models.llava)
        for expected, *reports in zip(known, *(rank["good"][case] for rank in ranks), strict=True):
            for report in reports:
                compare(report, expected, case)
                assert report["world_size"] == len(ranks)


def compare(report, expected, case):
    for field in ("mir", "scale_free_mir", "probe_loss", "vision_gain"):
        near = None if expected[field] is None else pytest.approx(expected[field], abs=1e-6)
        assert report[field] == near, (case, field)
    for field in ("mir_se", "influences"):  # from float32 products
        near = None if expected[field] is None else pytest.approx(expected[field], rel=1e-3, abs=1e-5)
        assert report[field] == near, (case, field)
    for field in ("num_samples", "num_vision_tokens", "num_text_tokens", "tokens_fingerprint"):
        assert report[field] == expected[field], (case, field)


EXPECTED = {
    "part_of_vocabulary": "UnsupportedModelError: probe_loss",
    "halves_apart": "UnsupportedModelError: MIR can't tell which ranks share samples",
    "split_on_rank_0": "UnsupportedModelError: rank 0 shares its model with ranks [0, 1",
    "last_stage": "UnsupportedModelError: LlamaModel in LlavaForConditionalGeneration has no ModuleList of 3",
    "deepspeed_pipeline": "UnsupportedModelError: MIR can't be measured under pipeline parallelism",
    "split_afterwards": "ConfigError: The model was split over ranks",
    "inside_context_parallel": "ConfigError: MIR can't be evaluated inside context_parallel",
    "own_weights": "UnsupportedModelError: Ranks hold different weights: the norm of",
    "replicas_of_parts": "UnsupportedModelError: MIR can't be measured under DDP over tensor parallelism",
    "unknown_split": "UnsupportedModelError: MIR can't be measured while __main__.unknown_split",
    "several_sequences": "UnsupportedModelError: MIR can't be measured with the attention of tests.model",
}
AFTER_A_FORWARD = ("part_of_vocabulary", "several_sequences")


def test_what_cannot_be_measured_is_refused_on_every_rank(ranks):
    for rank in ranks:
        assert rank["bad"].keys() in (EXPECTED.keys(), EXPECTED.keys() & FEW)
        for case, message in rank["bad"].items():
            assert message.startswith(EXPECTED[case]), message
            assert message.endswith("(after a forward)") == (case in AFTER_A_FORWARD), case
        assert f"secret 2 x dp {len(ranks) // 2}" in rank["bad"]["halves_apart"]


@pytest.mark.slow
@pytest.mark.parametrize("setup", SETUPS)
def test_training_is_the_same_to_the_last_bit(tmp_path, setup):
    worker = "tests.distributed.mesh_train_worker"
    plain, watched = (run_ranks(worker, tmp_path / each, setup, each) for each in ("off", "on"))
    for without, with_mir in zip(plain, watched, strict=True):
        for field in ("losses", "weights", "rng"):
            assert without[field] == with_mir[field], field
    history = watched[0]["history"]
    assert [record["step"] for record in history] == [0, 2, 4]
    # Both ranks train on the same samples.
    assert [record["samples_seen"] for record in history] == [step * MICRO_BATCH * ACCUMULATION for step in (0, 2, 4)]
    assert [rank["history"] for rank in watched] == [history, history]
    refused = "ConfigError: keep_best can't save this model: DeepSpeed's tensor parallelism"
    for rank in watched:
        assert rank["saver"].startswith(refused if setup == "deepspeed" else "TrainerSaver")
    model, processor = tiny_models.llava()
    assert history[0]["mir"] == pytest.approx(value(model, processor, NUM_SAMPLES)["mir"], abs=1e-6)
    if setup in ("transformers", "ulysses 1"):  # else the weights are in parts
        model.load_state_dict(torch.load(tmp_path / "on" / "weights.pt"), strict=False)
        trained = value(model, processor, NUM_SAMPLES)
        assert history[-1]["mir"] == pytest.approx(trained["mir"], abs=1e-6)
        assert history[-1]["vision_gain"] == pytest.approx(trained["vision_gain"], abs=1e-6)
