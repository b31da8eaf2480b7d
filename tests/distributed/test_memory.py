# SPDX-License-Identifier: Apache-2.0
"""Ranks with unlike memory take the same passes, and what runs out on one of them is done again on all."""

import pytest

from mir_callback import Probe, evaluate_mir
from tests import tiny_models
from tests.distributed.launch import run_ranks
from tests.distributed.memory_worker import COUNT, LAYERS
from tests.samples import pairs

WAYS = {
    "whole": (1, "device"),
    "one rank in passes": (3, "device"),
    "one rank on its host": (1, "host"),
    "unlike ways": (3, "host"),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_ranks("tests.distributed.memory_worker", tmp_path_factory.mktemp("memory"))


@pytest.mark.parametrize("case", WAYS)
def test_values_are_the_same_to_the_last_bit_however_each_rank_keeps_its_rows(ranks, case):
    whole = ranks[0]["whole"]["reports"][0]
    for rank in ranks:
        for report in rank[case]["reports"]:
            assert report["per_layer"] == whole["per_layer"]
            assert report["mir"] == whole["mir"]
            assert (report["passes"], report["storage_device"]) == WAYS[case]
            assert report["batch_size"] == 2


def test_value_equals_that_of_one_process(ranks):
    model, processor = tiny_models.llava(layers=LAYERS)
    alone = evaluate_mir(model, Probe.from_pairs(pairs(COUNT)), processor=processor, batch_size=2)
    assert ranks[0]["whole"]["reports"][0]["mir"] == pytest.approx(alone.mir, abs=1e-8)
    assert [rank["whole"]["ranks_here"] for rank in ranks] == [2, 2]


@pytest.mark.parametrize("case", ["whole", "one rank in passes"])
def test_ranks_agree_on_a_plan_in_the_one_exchange_that_ends_their_forwards(ranks, case):
    # The second one tells whose the rows are. The first evaluation compares two samples alone and together before.
    for rank in ranks:
        assert [report["exchanges"] for report in rank[case]["reports"]] == [8, 4]


def test_memory_that_runs_out_on_one_rank_halves_the_batches_of_all(ranks):
    whole = ranks[0]["whole"]["reports"][0]
    for number, rank in enumerate(ranks):
        first, second = rank["one rank hungry"]["reports"]
        assert first["batch_size"] == second["batch_size"] == 1
        assert first["mir"] == second["mir"] == pytest.approx(whole["mir"], abs=1e-7)
        assert len(first["shortages"]) == (1 if number == 0 else 0)
        assert second["shortages"] == []
    message = ranks[0]["one rank hungry"]["reports"][0]["shortages"][0]
    assert "batch_size=1 on every rank (rank 1: RuntimeError:" in message


def test_error_on_every_rank_when_one_cannot_even_take_one_sample(ranks):
    elsewhere, here = (rank["one rank never fed"]["error"] for rank in ranks)
    assert here.startswith("RuntimeError: ")
    assert "can't allocate memory" in here
    assert elsewhere.startswith("RemoteError: rank 1 failed: RuntimeError: ")


def test_error_on_every_rank_when_the_budget_is_too_small_for_one_layer(ranks):
    for rank in ranks:
        assert rank["too small"]["error"].startswith("ConfigError: ")
        assert "rows of one decoder layer" in rank["too small"]["error"]
