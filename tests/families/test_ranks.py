# SPDX-License-Identifier: Apache-2.0
"""Every family with its weights sharded over ranks whose samples differ: the values of one process, and no waiting."""

import pytest

from mir_callback import evaluate_mir
from tests.distributed.families_worker import unlike
from tests.distributed.launch import run_ranks
from tests.families.registry import families

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
MEASURED = [family for family in families() if not family.refused]


@pytest.fixture(scope="module")
def alone():
    values = {}
    for family in MEASURED:
        model, processor = family.build()
        values[family.name] = evaluate_mir(model, unlike(), processor=processor, batch_size=2).mir
    return values


@pytest.mark.families
@pytest.mark.parametrize("setup", ["zero3", "fsdp2"])
def test_values_do_not_depend_on_ranks(setup, alone, tmp_path):
    ranks = run_ranks("tests.distributed.families_worker", tmp_path, setup, environment=ONE_THREAD, timeout=1200)
    first, second = ranks
    assert first == second
    assert first == pytest.approx(alone, abs=1e-5)
