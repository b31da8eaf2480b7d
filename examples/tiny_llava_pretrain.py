# SPDX-License-Identifier: Apache-2.0
"""Pre-train a tiny LLaVA with the stock Trainer under DeepSpeed ZeRO-3, and stop it when MIR has reached its plateau.

    OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc_per_node 2 examples/tiny_llava_pretrain.py

(`make demo` does this.) It runs on the CPU, or on GPUs if there is one for each process; nothing is downloaded.

What is real: the images are scans of handwritten digits (scikit-learn's), two by two, the captions say what is in
them, and the prose is Python's own language reference. A tiny Llama learns the prose, and to continue a raster of digit
words with a caption; a tiny CLIP tower learns to see digits. This takes a minute or two and is cached. Then comes what
this example is about, LLaVA's first stage: both are frozen, and the projector between them is trained to caption
scenes, with LLaVA's own projector, learning rate, warm-up and cosine.

What is arranged: two features of the tower get a constant of 300, as large CLIP towers have such dimensions and this
small one doesn't (`add_massive_dimensions` in `tiny_llava/vision.py`). Without it the projector's outputs begin shorter
than the text tokens, and MIR rises and levels off. With it they begin longer; the projector first amplifies the
constant, then learns to drop it, and MIR rises, falls and settles. The values themselves are measured, on scans and
prose that neither backbone was trained with, and so is the step at which the plateau is found.

At the end the weights are saved, whole, so that `mir eval` can open them without DeepSpeed.

Training stops when MIR is confidently level: when by a line through the last evaluations (13 or more) the next tenth of
the run would change it by less than 0.04, on a curve that spans more than one.

What is not like a large run: 100 probe samples every 160 training samples watch very closely. That is a good part of
this demo's time, and next to nothing in a run with thousands of samples between evaluations.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tiny_llava.collator import CaptionCollator
from tiny_llava.prepare import prepare
from tiny_llava.progress import LossLines
from tiny_llava.runtime import (
    number_of_processes,
    offline_wandb,
    quieten,
    runs_on_cpu,
    set_up_deepspeed,
    start_process_group,
)
from tiny_llava.scenes import Scenes
from tiny_llava.short import REHEARSAL, Size
from tiny_llava.summary import summarise
from transformers import AutoProcessor, LlavaForConditionalGeneration, PrinterCallback, Trainer, TrainingArguments

from mir_callback import MIRCallback, PlateauRule, Probe
from mir_callback.analysis.pictures import plot_run

FULL = Size(steps=800, batch=16, every=10, probe_samples=100)  # the batch is over all processes


def main() -> None:
    """Prepare, pre-train, summarise."""
    options = parse_options()
    quieten()
    set_up_deepspeed(options.cache)
    size = REHEARSAL if options.rehearse else FULL
    start = prepare(options.cache, size.backbones)

    start_process_group()
    offline_wandb(options.output)
    args = training_arguments(size, options.output)
    processor = AutoProcessor.from_pretrained(start.model)
    model = LlavaForConditionalGeneration.from_pretrained(start.model)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Scenes(size.steps * size.batch, "train", seed=1, cell=size.backbones.cell),
        data_collator=CaptionCollator(processor),
        processing_class=processor,
        callbacks=[LossLines()],
    )
    trainer.remove_callback(PrinterCallback)

    probe = Probe.from_folders(images=start.images, texts=start.texts, num_samples=size.probe_samples, seed=0)
    rule = PlateauRule(min_delta=0.04, patience=2)  # steps of 16 samples: MIR is noisier than the rule likes
    mir = MIRCallback(probe, every=size.every, stop=rule, batch_size=50).attach(trainer)
    trainer.train()
    trainer.save_model()
    trainer.save_state()

    if trainer.is_world_process_zero():
        plot_run(mir.history, trainer.state.log_history, options.output / "mir.png")
        print(summarise(mir.history, trainer.state.log_history, size.steps, options.output))


def training_arguments(size: Size, output: Path) -> TrainingArguments:
    """LLaVA's first stage at the demo's size."""
    return TrainingArguments(
        output_dir=str(output),
        max_steps=size.steps,
        per_device_train_batch_size=size.batch // number_of_processes(),
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.03 * size.steps),
        weight_decay=0.0,
        logging_steps=size.every,
        disable_tqdm=True,
        save_strategy="no",
        report_to="wandb",
        run_name="tiny-llava-pretrain",
        remove_unused_columns=False,  # the collator reads them
        deepspeed=str(Path(__file__).parent / "tiny_llava" / "zero3.json"),
        use_cpu=runs_on_cpu(),
    )


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Pre-train a tiny LLaVA and stop when MIR has reached its plateau.")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of the run")
    parser.add_argument("--cache", type=Path, default=Path("runs/demo_cache"), help="folder of the trained backbones")
    parser.add_argument("--rehearse", action="store_true", help="a few steps only; the values mean nothing")
    options = parser.parse_args()
    if "WORLD_SIZE" not in os.environ:
        parser.error("start it with torchrun: torchrun --standalone --nproc_per_node 2 " + __file__)
    return options


if __name__ == "__main__":
    main()
