# SPDX-License-Identifier: Apache-2.0
"""Watch MIR in the Hugging Face Trainer: one call of `attach_mir`.

    .venv/bin/python examples/stock_trainer.py
    OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc_per_node 2 examples/stock_trainer.py
    .venv/bin/python examples/stock_trainer.py --resume --steps 60

A tiny LLaVA with random weights, nothing is downloaded, seconds on two cores.
"""

from __future__ import annotations

from collections.abc import Sequence

from tiny_llava.collator import CaptionCollator
from tiny_llava.untrained import make_data, make_model, make_probe, parse_options, say_where
from transformers import Trainer, TrainingArguments

from mir_callback import PlateauRule, attach_mir


def main(arguments: Sequence[str] | None = None) -> Trainer:
    """Train; returns the Trainer."""
    options = parse_options(__doc__, arguments, "runs/stock_trainer")
    model, processor = make_model()
    args = TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=options.learning_rate,
        logging_steps=2,
        save_steps=10,
        remove_unused_columns=False,  # the collator reads them
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=make_data(512),
        data_collator=CaptionCollator(processor),
        processing_class=processor,
    )
    # --- MIR ---
    attach_mir(trainer, make_probe(), every=2, stop=PlateauRule())
    # -----------
    trainer.train(resume_from_checkpoint=options.resume)
    if trainer.is_world_process_zero():
        say_where(options.output)
    return trainer


if __name__ == "__main__":
    main()
