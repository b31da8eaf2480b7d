# SPDX-License-Identifier: Apache-2.0
"""Watch MIR under Lightning's Trainer, on one process or several: one callback.

    .venv/bin/python examples/lightning_module.py
    OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc_per_node 2 examples/lightning_module.py
    .venv/bin/python examples/lightning_module.py --resume --steps 60

A tiny LLaVA with random weights, nothing is downloaded, seconds on two cores. Needs `pip install lightning`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny_llava.collator import CaptionCollator
from tiny_llava.untrained import make_data, make_model, make_probe, parse_options, say_where
from torch import nn
from torch.utils.data import DataLoader

from mir_callback import PlateauRule
from mir_callback.integrations.lightning import MIRLightningCallback

BATCH, ACCUMULATION, SAVE_EVERY = 4, 2, 10


class Captioner(LightningModule):
    """A LLaVA that learns to caption."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.vlm, self.processor = make_model()
        self.learning_rate = learning_rate
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """The loss of a batch."""
        loss: torch.Tensor = self.vlm(**batch).loss
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def main(arguments: Sequence[str] | None = None) -> tuple[nn.Module, list[float]]:
    """Train; returns the model and the loss of each batch on this rank."""
    options = parse_options(__doc__, arguments, "runs/lightning")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    module = Captioner(options.learning_rate)
    data = make_data(options.steps * ACCUMULATION * BATCH * ranks)
    loader = DataLoader(data, BATCH, collate_fn=CaptionCollator(module.processor))
    torch.manual_seed(int(os.environ.get("RANK", "0")))

    callbacks: list[Any] = [
        ModelCheckpoint(options.output / "checkpoints", every_n_train_steps=SAVE_EVERY, save_last=True)
    ]
    # --- MIR ---
    callbacks.append(MIRLightningCallback(make_probe(), every=2, stop=PlateauRule()))
    # -----------
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_steps=options.steps,
        accumulate_grad_batches=ACCUMULATION,
        default_root_dir=options.output,
        logger=CSVLogger(options.output, name=None),
        log_every_n_steps=1,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, ckpt_path=options.output / "checkpoints" / "last.ckpt" if options.resume else None)

    if trainer.is_global_zero:
        say_where(options.output)
    return module, module.losses


if __name__ == "__main__":
    main()
