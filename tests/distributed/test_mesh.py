# SPDX-License-Identifier: Apache-2.0
"""Models split over ranks: the value is that of one process, or the run is refused by name on every rank."""

import functools

import pytest
import torch

from tests import tiny_models
from tests.distributed.launch import run_ranks
from tests.distributed.mesh_train_worker import NUM_SAMPLES, SETUPS
from tests.distributed.mesh_worker import COUNTS, GOOD, mixture, value


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"mesh{request.param}")
    return run_ranks("tests.distributed.mesh_worker", folder, processes=request.param, timeout=180)


@pytest.fixture(scope="module")
def alone():
    return functools.cache(lambda build: [value(*build(), count) for count in COUNTS])


@pytest.mark.parametrize("case", GOOD)
def test_value_is_that_of_one_process(ranks, alone, case):
    expected = alone(mixture if case == "by_experts" else tiny_models.llava)
    for reports in zip(expected, *(rank["good"][case] for rank in ranks), strict=True):
        expected = reports[0]
        for report in reports[1:]:
            assert report["world_size"] == len(ranks)
            for field in ("mir", "scale_free_mir", "probe_loss", "vision_gain"):
                known = expected[field]
                assert report[field] == (None if known is None else pytest.approx(known, abs=1e-6)), field
            for field in ("mir_se", "influences"):
                known = expected[field]
                assert report[field] == (None if known is None else pytest.approx(known, rel=1e-3, abs=1e-5)), field
            for field in ("num_samples", "num_vision_tokens", "num_text_tokens", "tokens_fingerprint"):
                assert report[field] == expected[field], field


EXPECTED = {
    "part_of_vocabulary": "UnsupportedModelError: probe_loss",
    "halves_apart": "UnsupportedModelError: MIR can't tell which ranks share samples",
    "split_on_rank_0": "UnsupportedModelError: rank 0 shares its model with ranks [0, 1",
    "last_stage": "UnsupportedModelError: LlamaModel in LlavaForConditionalGeneration has no ModuleList of 3",
    "deepspeed_pipeline": "UnsupportedModelError: MIR can't be measured under pipeline parallelism",
    "split_afterwards": "ConfigError: ",
    "inside_context_parallel": "ConfigError: MIR can't be evaluated inside context_parallel",
    "unknown_split": "UnsupportedModelError: MIR can't be measured while __main__.unknown_split",
}


@pytest.mark.parametrize("case", EXPECTED)
def test_what_cannot_be_measured_is_refused_on_every_rank(ranks, case):
    for rank in ranks:
        if case == "halves_apart":
            assert f"secret 2 x dp {len(ranks) // 2}" in rank["bad"][case]
        if case == "split_afterwards":
            assert f"of {len(ranks)} and is 1 of 1" in rank["bad"][case]
        assert rank["bad"][case].startswith(EXPECTED[case]), rank["bad"][case]
        assert rank["bad"][case].endswith("(after a forward)") == (case == "part_of_vocabulary")


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
    assert [rank["history"] for rank in watched] == [history, history]
    model, processor = tiny_models.llava()
    assert history[0]["mir"] == pytest.approx(value(model, processor, NUM_SAMPLES)["mir"], abs=1e-6)
    if setup in ("transformers", "ulysses 1"):  # else the weights are in parts
        model.load_state_dict(torch.load(tmp_path / "on" / "weights.pt"), strict=False)
        trained = value(model, processor, NUM_SAMPLES)
        assert history[-1]["mir"] == pytest.approx(trained["mir"], abs=1e-6)
        assert history[-1]["vision_gain"] == pytest.approx(trained["vision_gain"], abs=1e-6)
