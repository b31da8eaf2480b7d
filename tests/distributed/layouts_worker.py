# SPDX-License-Identifier: Apache-2.0
"""One rank of a run under ZeRO-3 that is measured on samples of any layout: `layouts_worker FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from mir_callback import MIRCallback, Probe
from mir_callback.probe.adapters import HuggingFaceAdapter
from tests.distributed.launch import write_rank
from tests.distributed.train_worker import deepspeed_config
from tests.layouts import mixed
from tests.training.runs import make_trainer


def main(folder: str) -> None:
    """Train, then write the values measured while training."""
    trainer = make_trainer(Path(folder) / "run", deepspeed=deepspeed_config("3"), ddp_backend="gloo", steps=2)
    adapter = HuggingFaceAdapter(trainer.model, trainer.processing_class)
    probe = Probe.from_samples(mixed(8))  # without an order of their own, ranks would get other modalities at a time
    callback = MIRCallback(probe, adapter=adapter, every=1, batch_size=1, text_only="count").attach(trainer)
    trainer.train()
    write_rank(folder, dist.get_rank(), [record.to_dict() for record in callback.history])


if __name__ == "__main__":
    main(sys.argv[1])
