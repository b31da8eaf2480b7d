# SPDX-License-Identifier: Apache-2.0
"""The README's example, as written, pasted around a stock Trainer."""

import re
from pathlib import Path

from transformers import Trainer

from tests.samples import write_folders
from tests.training.runs import make_trainer

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_example_works_as_written(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    images, texts = write_folders(tmp_path, 100)
    (tmp_path / "textvqa").mkdir()
    (tmp_path / "cnn").mkdir()
    images.rename(tmp_path / "textvqa" / "val")
    texts.rename(tmp_path / "cnn" / "stories")
    monkeypatch.chdir(tmp_path)
    prepared = make_trainer(tmp_path / "run", steps=3)
    names = {
        "Trainer": Trainer,
        "model": prepared.model,
        "args": prepared.args,
        "dataset": prepared.train_dataset,
        "collator": prepared.data_collator,
        "processor": prepared.processing_class,
    }
    exec(compile(code, "README.md", "exec"), names)
    assert names["trainer"].state.global_step == 3
    assert (tmp_path / "run" / "mir_history.jsonl").read_text().count("\n") == 2
    assert "[mir] step 3: MIR" in capsys.readouterr().out
