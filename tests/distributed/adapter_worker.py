# SPDX-License-Identifier: Apache-2.0
"""One rank of a run that trains a PEFT adapter under ZeRO-3 and saves it: `adapter_worker FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from peft import LoraConfig, get_peft_model

from mir_callback import MIRCallback, Probe
from tests.distributed.launch import write_rank
from tests.distributed.train_worker import deepspeed_config
from tests.samples import pairs
from tests.training.runs import make_trainer


def adapted(model: Any, base: str | Path, *, write: bool) -> Any:
    """The model with an adapter and a trained projector; the model itself in ``base``, where the adapter looks."""
    if write:
        model.save_pretrained(base, is_main_process=True)
    model.name_or_path = str(base)
    targets = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["multi_modal_projector"]}
    return get_peft_model(model, LoraConfig(**targets))


def main(folder: str) -> None:
    """Train, then write the values measured while training."""
    trainer = make_trainer(
        Path(folder) / "run",
        wrap=lambda model: adapted(model, Path(folder) / "base", write=dist.get_rank() == 0),
        deepspeed=deepspeed_config("3"),
        ddp_backend="gloo",
        save_strategy="steps",
        save_steps=3,
    )
    callback = MIRCallback(Probe.from_pairs(pairs(5)), every=3).attach(trainer)
    trainer.train()
    write_rank(folder, dist.get_rank(), [record.to_dict() for record in callback.history])


if __name__ == "__main__":
    main(sys.argv[1])
