# SPDX-License-Identifier: Apache-2.0
"""`mir eval` on two ranks: the values of one, told and written once, and in step past a checkpoint that fails."""

import pytest

from mir_callback import MIRCallback, Probe
from mir_callback.history import read_history
from tests.distributed.launch import run_process, run_ranks
from tests.samples import pairs
from tests.training.runs import make_trainer


def mir_eval(*arguments, ranks=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return run_process([*launcher, "-m", "mir_callback", "eval", *map(str, arguments), "--device", "cpu"])


def test_two_ranks_share_the_probe_and_go_on_together_past_a_broken_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path / "run", save_strategy="steps", save_steps=2)
    probe = Probe.from_pairs(pairs(5), matched=True)
    callback = MIRCallback(probe, every=2, vision_gain=True).attach(trainer)
    trainer.train()
    (tmp_path / "run" / "checkpoint-4" / "model.safetensors").write_bytes(b"torn")
    done = mir_eval(tmp_path / "run", "--probe", probe.save(tmp_path / "probe.zip"), "--vision-gain", ranks=2)
    assert done.returncode != 0
    written = read_history(tmp_path / "run" / "mir_eval.jsonl")
    live = {record.step: record.mir for record in callback.history}
    gains = {record.step: record.vision_gain for record in callback.history}
    assert [record.vision_gain for record in written] == pytest.approx([gains[2], gains[6]], abs=1e-6)
    assert [record.step for record in written] == [2, 6]
    assert [record.mir for record in written] == pytest.approx([live[2], live[6]], abs=1e-6)
    assert [record.world_size for record in written] == [2, 2]
    assert [line.split()[:2] for line in done.stdout.splitlines() if line.startswith("  step")] == [
        ["step", "2"],
        ["step", "6"],
    ]
    told = [line for line in done.stderr.splitlines() if line.startswith("mir eval: ")]
    assert len(told) == 2
    assert "checkpoint-4: " in told[0]
    assert "1 could not be measured" in told[1]


@pytest.mark.slow
def test_an_adapter_trained_under_zero3_has_the_value_the_run_measured_itself_from_its_file_and_from_shards(tmp_path):
    live = run_ranks("tests.distributed.adapter_worker", tmp_path)[0]
    probe = Probe.from_pairs(pairs(5)).save(tmp_path / "probe.zip")
    for name in ("adapter_model.safetensors", None):
        done = mir_eval(tmp_path / "run", "--probe", probe)
        assert done.returncode == 0, done.stderr
        assert "  cached  " not in done.stdout
        values = [record.mir for record in read_history(tmp_path / "run" / "mir_eval.jsonl")]
        assert values == pytest.approx([record["mir"] for record in live[1:]], abs=1e-6)
        for file in (tmp_path / "run").glob(f"checkpoint-*/{name}"):
            file.unlink()
