# SPDX-License-Identifier: Apache-2.0
"""Watch MIR in TRL's SFTTrainer, which trains a vision-language model on conversations about images.

    .venv/bin/python examples/trl_sft.py
    OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc_per_node 2 examples/trl_sft.py
    .venv/bin/python examples/trl_sft.py --resume --steps 60

A tiny LLaVA with random weights, nothing is downloaded, seconds on two cores. Needs `pip install trl`.
"""

from __future__ import annotations

from collections.abc import Sequence

from datasets import Dataset
from tiny_llava.untrained import make_data, make_model, make_probe, parse_options, say_where
from trl import SFTConfig, SFTTrainer

from mir_callback import PlateauRule, attach_mir


def main(arguments: Sequence[str] | None = None) -> SFTTrainer:
    """Train; returns the Trainer."""
    options = parse_options(__doc__, arguments, "runs/trl_sft")
    model, processor = make_model()
    args = SFTConfig(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=options.learning_rate,
        logging_steps=2,
        save_steps=10,
        max_length=None,  # an image is not cut short
        bf16=False,  # TRL's default is for GPUs
        use_cpu=True,
    )
    trainer = SFTTrainer(model=model, args=args, train_dataset=conversations(512), processing_class=processor)
    # --- MIR ---
    attach_mir(trainer, make_probe(), every=2, stop=PlateauRule())
    # -----------
    trainer.train(resume_from_checkpoint=options.resume)
    if trainer.is_world_process_zero():
        say_where(options.output)
    return trainer


def conversations(size: int) -> Dataset:
    """Scenes, what is asked about them and what is to be answered."""
    scenes = make_data(size)
    return Dataset.from_list([as_conversation(scenes[index]) for index in range(size)])


def as_conversation(scene: dict) -> dict:
    """A row as TRL takes it."""
    said = {"user": "Which digits are there?", "assistant": scene["caption"]}
    return {"images": [scene["image"]], "messages": [{"role": who, "content": text} for who, text in said.items()]}


if __name__ == "__main__":
    main()
