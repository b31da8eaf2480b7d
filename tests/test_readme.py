# SPDX-License-Identifier: Apache-2.0
"""The README's examples, as written, pasted around a stock Trainer and into a plain loop."""

import re
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from mir_callback import PlateauRule, Probe
from mir_callback.history import read_history
from tests.samples import pairs, write_folders
from tests.training.runs import make_trainer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """The code of both, run in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_example_of_a_trainer_works_as_written(tmp_path, examples, capsys):
    images, texts = write_folders(tmp_path, 100)
    (tmp_path / "textvqa").mkdir()
    (tmp_path / "cnn").mkdir()
    images.rename(tmp_path / "textvqa" / "val")
    texts.rename(tmp_path / "cnn" / "stories")
    prepared = make_trainer(tmp_path / "run", steps=3)
    names = {
        "Trainer": Trainer,
        "model": prepared.model,
        "args": prepared.args,
        "dataset": prepared.train_dataset,
        "collator": prepared.data_collator,
        "processor": prepared.processing_class,
    }
    exec(compile(examples[0], "README.md", "exec"), names)
    assert names["trainer"].state.global_step == 3
    assert (tmp_path / "run" / "mir_history.jsonl").read_text().count("\n") == 2
    assert "[mir] step 3: MIR" in capsys.readouterr().out


def test_example_of_a_plain_loop_works_as_written(tmp_path, examples):
    prepared = make_trainer(tmp_path)
    names = {
        "model": prepared.model,
        "processor": prepared.processing_class,
        "probe": Probe.from_pairs(pairs(6)),
        "optimizer": torch.optim.SGD(prepared.model.parameters(), lr=0.1),
        "PlateauRule": PlateauRule,
        "loader": [None] * 60,
        "loss": torch.tensor(3.5),
    }
    exec(compile(examples[1], "README.md", "exec"), names)
    records = read_history(tmp_path / "runs" / "a" / "mir_history.jsonl")
    assert [(record.step, record.loss, record.max_steps) for record in records[1:]] == [
        (50, 3.5, 2000),
        (60, 3.5, 2000),
    ]
    assert names["monitor"].history == records
