# SPDX-License-Identifier: Apache-2.0
"""One rank runs out of memory in one part of an evaluation after another: each is healed or ends it on both ranks."""

import pytest

from tests.distributed.launch import run_ranks
from tests.faults.memory import ENVIRONMENT
from tests.faults.memory_worker import CASES, HEALED

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


@pytest.mark.parametrize("case", HEALED)
def test_evaluation_is_done_again_on_every_rank_when_one_runs_out_of_memory_in_its_forwards(ranks, case):
    here, elsewhere = (rank["healed"][case] for rank in ranks)
    assert here == elsewhere
    smaller_batches = case == "forward"
    assert here["batch_size"] == (5 if smaller_batches else 10)
    assert here["passes"] == (1 if smaller_batches else 2)
    healthy = ranks[0]["healthy"][HEALED[case][2]]
    assert here["value"] == pytest.approx(healthy, abs=1e-7 if smaller_batches else 0)
