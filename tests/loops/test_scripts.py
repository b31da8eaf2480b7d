# SPDX-License-Identifier: Apache-2.0
"""The examples of loops as a user starts them."""

import math

import pytest

from mir_callback.history import read_history
from tests.distributed.launch import run_process
from tests.loops.running import EXAMPLES


@pytest.mark.parametrize(
    "name", ["stock_trainer", *(pytest.param(name, marks=pytest.mark.slow) for name in ("trl_sft", *EXAMPLES))]
)
def test_script_leaves_a_history_and_says_where_it_is(tmp_path, name):
    done = run_process([f"examples/{name}.py", "--output", str(tmp_path), "--steps", "4"])
    assert done.returncode == 0, done.stderr[-6000:]
    records = read_history(tmp_path / "mir_history.jsonl")
    assert [record.step for record in records] == [0, 2, 4]
    assert all(math.isfinite(record.mir) for record in records)
    assert math.isfinite(records[-1].loss)
    last = done.stdout.splitlines()[-1]
    assert str(tmp_path / "mir_history.jsonl") in last
    assert f"mir report {tmp_path}" in last
