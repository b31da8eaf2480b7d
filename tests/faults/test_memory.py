# SPDX-License-Identifier: Apache-2.0
"""One rank runs out of memory in one part of an evaluation after another: each ends the evaluation on both ranks."""

import pytest

from tests.distributed.launch import run_ranks
from tests.faults.memory import ENVIRONMENT
from tests.faults.memory_worker import CASES

pytestmark = pytest.mark.faults

SECONDS = 10


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    return run_ranks("tests.faults.memory_worker", folder, environment=ENVIRONMENT, timeout=120)


@pytest.mark.parametrize("case", CASES)
def test_evaluation_ends_on_every_rank_when_one_runs_out_of_memory(ranks, case):
    elsewhere, here = (rank["cases"][case] for rank in ranks)
    assert "memory" in here["error"].lower()
    assert elsewhere["error"].startswith(f"RemoteError: rank 1 failed: {here['error'][:60]}")
    assert max(elsewhere["seconds"], here["seconds"]) < SECONDS


@pytest.mark.parametrize("case", CASES)
def test_next_evaluation_gives_the_healthy_value_after_a_shortage_of_memory(ranks, case):
    name = CASES[case][2]
    for rank in ranks:
        assert rank["cases"][case]["value afterwards"] == rank["healthy"][name]
