# SPDX-License-Identifier: Apache-2.0
"""One process that trains a tiny LLaVA for a step under DeepSpeed and saves its shards: `shards_worker FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed
import torch

from mir_callback import Probe, evaluate_mir
from tests import tiny_models
from tests.distributed.launch import write_rank
from tests.samples import pairs

STAGES = (2, 3)
NUM_SAMPLES = 5


def main(folder: str) -> None:
    """Save one checkpoint of each stage, and write the MIR of each."""
    probe = Probe.from_pairs(pairs(NUM_SAMPLES))
    probe.save(Path(folder) / "probe.zip")
    values = {}
    for stage in STAGES:
        model, processor = tiny_models.llava()
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        words = processor.tokenizer("a few words", return_tensors="pt").input_ids
        engine.backward(engine(input_ids=words, labels=words).loss)
        engine.step()
        place = Path(folder) / f"zero{stage}"
        values[stage] = evaluate_mir(engine, probe, processor=processor).mir
        engine.save_checkpoint(str(place), tag="global_step1", client_state={"seen": 1})
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(place)
        processor.save_pretrained(place)
        engine.destroy()
    write_rank(folder, 0, values)


if __name__ == "__main__":
    main(sys.argv[1])
