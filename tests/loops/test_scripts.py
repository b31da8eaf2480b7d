# SPDX-License-Identifier: Apache-2.0
"""The examples of loops as a user starts them, and what is TRL's own."""

import math

import pytest

from mir_callback.history import read_history
from tests.distributed.launch import run_process
from tests.loops.running import SOME_SLOW, example
from tests.training.digest import digest


@pytest.mark.parametrize("name", ["stock_trainer", "trl_sft", *SOME_SLOW])
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


@pytest.fixture
def sft(tmp_path, monkeypatch):
    """Runs TRL's example with other options of MIR, or None for without; returns its Trainer."""
    module = example("trl_sft")
    attach = module.attach_mir

    def run(options):
        def watch(trainer, probe, **named):
            return None if options is None else attach(trainer, probe, **{**named, **options})

        monkeypatch.setattr(module, "attach_mir", watch)
        return module.main(["--output", str(tmp_path / ("plain" if options is None else "watched")), "--steps", "6"])

    return run


def test_rows_and_weights_of_trl_are_those_of_a_run_without_mir(sft):
    """TRL averages entropy and token accuracy since the last row it has logged: ours must not count as one."""
    plain, watched = sft(None), sft({"every": 1})
    rows, ours = [], []
    for row in watched.state.log_history:
        (ours if "mir" in row else rows).append(row)
    assert [row["step"] for row in ours] == [0, 1, 2, 3, 4, 5, 6]
    assert {key for row in ours for key in row if not key.startswith("mir")} == {"epoch", "step"}
    losses = [row for row in rows if "loss" in row]
    assert losses == [row for row in plain.state.log_history if "loss" in row]
    assert [row["step"] for row in losses] == [2, 4, 6]
    assert {"entropy", "mean_token_accuracy", "num_tokens"} <= set(losses[0])
    assert digest(watched.model.state_dict()) == digest(plain.model.state_dict())
