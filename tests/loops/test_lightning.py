# SPDX-License-Identifier: Apache-2.0
"""What is Lightning's own of its callback; what all loops have in common is in test_loops.py."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import wandb
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from torch.utils.data import DataLoader, IterableDataset

from mir_callback import MIRConfig, Probe, evaluate_mir
from mir_callback.errors import ConfigError, UnsupportedModelError
from mir_callback.integrations.lightning import MIRLightningCallback, find_model
from tests import tiny_models
from tests.samples import pairs
from tests.training import wandb_file
from tests.training.runs import Pairs, collator


@pytest.fixture(scope="module")
def probe():
    return Probe.from_pairs(pairs(4))


class Module(LightningModule):
    """A LLaVA among other things."""

    def __init__(self, **parts):
        super().__init__()
        self.vlm, self.processor = tiny_models.llava()
        for name, part in parts.items():
            setattr(self, name, part)

    def training_step(self, batch, batch_idx):
        return {"loss": self.vlm(**batch).loss}

    def validation_step(self, batch, batch_idx):
        self.vlm(**batch)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Stream(IterableDataset):
    """Data without a length."""

    def __iter__(self):
        return iter(pairs(64, seed=9))


def fit(folder, *callbacks, module=None, data=None, validate=False, **options):
    module = module or Module()
    collate = collator(module.processor)
    trainer = Trainer(
        **{"max_steps": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, **options},
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(Pairs(16) if data is None else data, 2, collate_fn=collate)
    trainer.fit(module, loader, DataLoader(Pairs(2), 2, collate_fn=collate) if validate else None)
    return module


def steps_of(callback):
    return [record.step for record in callback.history]


def test_forwards_of_the_probe_are_made_in_the_precision_of_training(tmp_path, probe):
    module = Module()
    with torch.autocast("cpu", torch.bfloat16):
        expected = evaluate_mir(module.vlm, probe, processor=module.processor).mir
    callback = MIRLightningCallback(probe, every=2)
    fit(tmp_path, callback, module=module, precision="bf16-mixed")
    assert callback.history[0].mir == pytest.approx(expected, abs=1e-9)
    plain = evaluate_mir(Module().vlm, probe, processor=module.processor).mir
    assert callback.history[0].mir != pytest.approx(plain, abs=1e-7)


def test_accumulated_steps_count_once_with_the_loss_as_it_was(tmp_path, probe):
    class Noted(Module):
        losses = ()

        def training_step(self, batch, batch_idx):
            found = super().training_step(batch, batch_idx)
            self.losses = (*self.losses, found["loss"].item())
            return found

    callback, module = MIRLightningCallback(probe, every=1), Noted()
    fit(tmp_path, callback, module=module, accumulate_grad_batches=2)
    assert steps_of(callback) == [0, 1, 2, 3]
    assert [record.loss for record in callback.history[1:]] == pytest.approx(module.losses[1::2])
    assert [record.epoch for record in callback.history] == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(("also_on", "steps"), [("evaluate", [3]), ("save", [2, 4]), ("start,end", [0, 5])])
def test_events_of_the_trainer_are_evaluated_at_if_asked_for(tmp_path, probe, also_on, steps):
    callback = MIRLightningCallback(probe, every=50, also_on=also_on)
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2)
    fit(tmp_path, callback, saving, validate=True, max_steps=5, val_check_interval=3, enable_checkpointing=True)
    assert steps_of(callback) == steps


def test_a_stream_has_whole_epochs_and_steps_as_far_as_they_are_planned(tmp_path, probe):
    callback = MIRLightningCallback(probe, every=2)
    fit(tmp_path, callback, data=Stream())
    assert [(record.step, record.epoch, record.max_steps) for record in callback.history] == [
        (0, 0.0, 3),
        (2, 0.0, 3),
        (3, 0.0, 3),
    ]


def test_a_second_fit_has_a_history_of_its_own_with_the_seed_that_lightning_has(tmp_path, probe, monkeypatch):
    callback = MIRLightningCallback(probe, every=2)
    for folder, seed in (("first", None), ("second", 7)):
        monkeypatch.setenv("PL_GLOBAL_SEED", "")  # set back after the test
        if seed is not None:
            seed_everything(seed)
        fit(tmp_path / folder, callback, max_steps=2)
        assert [(record.step, record.seed) for record in callback.history] == [(0, seed), (2, seed)]


def test_the_model_is_the_only_one_of_hugging_face():
    module = Module(head=torch.nn.Linear(2, 2))
    assert find_model(module, None) is module.vlm  # and not its tower or its language model
    with pytest.raises(ConfigError, match="Module has 2 .*vlm, teacher"):
        find_model(Module(teacher=tiny_models.llava()[0]), None)
    two = Module(teacher=tiny_models.llava()[0])
    assert find_model(two, "teacher") is two.teacher
    assert find_model(two, "vlm.model.language_model") is two.vlm.model.language_model
    assert find_model(two, lambda module: module.vlm) is two.vlm
    with pytest.raises(ConfigError, match="Linear has 0 "):
        find_model(torch.nn.Linear(2, 2), None)


def test_what_cannot_be_watched_is_refused_before_the_first_forward(tmp_path, probe):
    class FSDPStrategy:
        """As Lightning's, which needs a GPU."""

    with pytest.raises(UnsupportedModelError, match="FSDPStrategy"):
        MIRLightningCallback(probe).on_train_start(SimpleNamespace(strategy=FSDPStrategy()), Module())
    with pytest.raises(ConfigError, match="'batchsize'"):
        MIRLightningCallback(probe, batchsize=3)


def test_wandb_of_lightning_has_mir_over_its_own_steps_and_the_charts(tmp_path, probe, monkeypatch):
    class Noted(Module):
        def training_step(self, batch, batch_idx):
            found = super().training_step(batch, batch_idx)
            self.log("loss", found["loss"])
            return found

    monkeypatch.setenv("WANDB_SILENT", "true")
    callback, logger = MIRLightningCallback(probe, every=2), WandbLogger(offline=True, save_dir=tmp_path)
    fit(tmp_path / "run", callback, module=Noted(), logger=logger, max_steps=5, log_every_n_steps=1)
    wandb.finish()
    wandb.teardown()
    rows = wandb_file.rows(tmp_path)
    ours = {row["trainer/global_step"]: row["mir"] for row in rows if "mir" in row}
    assert ours == {record.step: record.mir for record in callback.history}
    assert [row["trainer/global_step"] for row in rows if "loss" in row] == [0, 1, 2, 3, 4]  # Lightning counts from 0
    assert not any("train/mir" in row for row in rows)
    assert all("mir/layers_over_steps/values" in row for row in rows if "mir" in row)


def test_options_are_shown_in_the_signature(probe):
    shown = inspect.signature(MIRLightningCallback).parameters
    assert {*MIRConfig.__dataclass_fields__, "probe", "processor", "adapter", "model"} == set(shown)
