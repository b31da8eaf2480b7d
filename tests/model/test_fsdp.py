# SPDX-License-Identifier: Apache-2.0
"""FSDP2 and FSDP1 after an evaluation, also a failed one: all in its shards again, and training as without it."""

import pytest

from mir_callback import evaluate_mir
from tests import tiny_models
from tests.distributed.launch import run_ranks
from tests.model.fsdp_worker import PROBE, SETUPS

FAST = ("FSDP2", "within another module", "FSDP1")


@pytest.fixture(scope="module")
def untrained():
    model, processor = tiny_models.llava()
    return evaluate_mir(model, PROBE, processor=processor, batch_size=2).mir


@pytest.mark.parametrize(
    "names",
    [FAST, pytest.param([name for name in SETUPS if name not in FAST], marks=pytest.mark.slow)],
    ids=["fast", "all"],
)
def test_weights_are_in_their_shards_and_training_goes_on_as_without(tmp_path, untrained, names):
    for rank in run_ranks("tests.model.fsdp_worker", tmp_path, *names):
        for name, found in rank.items():
            assert set(found["left"]) == {0}, name
            assert found["losses"] == found["plain"], name
            assert len(found["errors"]) == 4
            assert all("a layer fails" in error for error in found["errors"])
            if name != "FSDP1":
                assert found["left by others"] > 0, name
            values = found["values"]
            assert values[0::2] == values[1::2], name
            assert len(set(values)) == 4
            assert values[0] == pytest.approx(untrained, abs=5e-3 if name == "bfloat16" else 1e-8), name
