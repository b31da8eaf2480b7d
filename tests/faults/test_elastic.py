# SPDX-License-Identifier: Apache-2.0
"""A run that is killed and goes on with another number of ranks, from checkpoints written in the background."""

import pytest
import torch

from mir_callback import Probe, evaluate_mir
from mir_callback.history import read_history
from tests import tiny_models
from tests.distributed.launch import run_process
from tests.faults.elastic_worker import EVERY, NUM_SAMPLES, SAVED_EVERY, STEPS
from tests.samples import pairs

pytestmark = pytest.mark.faults


def start(folder, ranks, last_step, killed_step=0):
    """One start of the run, from its newest checkpoint; everything it printed."""
    worker = ["-m", "tests.faults.elastic_worker", str(folder), str(last_step), str(killed_step)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = run_process([*torchrun, *worker] if ranks > 1 else worker, timeout=120)
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == (killed_step == 0), output[-4000:]
    return output


def test_a_history_goes_on_over_a_killed_rank_and_with_other_numbers_of_ranks(tmp_path):
    outputs = [start(tmp_path, 2, last_step=6, killed_step=5)]
    outputs += [start(tmp_path, 2, last_step=6), start(tmp_path, 1, last_step=9), start(tmp_path, 3, last_step=STEPS)]

    assert "SIGKILL" in outputs[0]
    records = read_history(tmp_path / "run" / "mir_history.jsonl")
    assert [record.step for record in records] == list(range(0, STEPS + 1, EVERY))
    assert [record.world_size for record in records] == [2, 2, 2, 1, 1, 3, 3]
    assert len({record.stage for record in records}) == 1  # for which the stop rule would begin anew
    aside = read_history(tmp_path / "run" / "mir_history.1.jsonl")
    assert {record.step for record in aside} <= {0, 2, 4, 6}
    said = "the conditions of the measurement have changed"
    assert [output.count(said) for output in outputs] == [0, 0, 1, 1]

    model, processor = tiny_models.llava()
    probe = Probe.from_pairs(pairs(NUM_SAMPLES))
    assert records[0].mir == pytest.approx(evaluate_mir(model, probe, processor=processor).mir, abs=1e-6)
    for record in records[1:]:
        model.load_state_dict(torch.load(tmp_path / f"weights-{record.step}.pt"))
        assert record.mir == pytest.approx(evaluate_mir(model, probe, processor=processor).mir, abs=1e-6)
    saved = {int(each.parent.name) for each in (tmp_path / "checkpoints").glob("*/.metadata")}
    assert saved == set(range(SAVED_EVERY, STEPS + 1, SAVED_EVERY))
