# SPDX-License-Identifier: Apache-2.0
"""Watch MIR in a loop on Hugging Face Accelerate, on one process or several.

    .venv/bin/python examples/accelerate_loop.py
    OMP_NUM_THREADS=1 .venv/bin/torchrun --standalone --nproc_per_node 2 examples/accelerate_loop.py
    .venv/bin/python examples/accelerate_loop.py --resume --steps 60

A tiny LLaVA with random weights, nothing is downloaded, seconds on two cores. On the CPU `accelerate launch` starts one
process, whatever it is asked for; torchrun starts several. The loop has what real ones have:
gradient accumulation, checkpoints, a tracker. MIR is what stands between the marks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from tiny_llava.collator import CaptionCollator
from tiny_llava.untrained import make_data, make_model, make_probe, parse_options, say_where
from torch import nn
from torch.utils.data import DataLoader

from mir_callback import MIRMonitor, PlateauRule

BATCH, ACCUMULATION, SAVE_EVERY = 4, 2, 10


def main(arguments: Sequence[str] | None = None) -> tuple[nn.Module, list[float]]:
    """Train; returns the model and the loss of each step on this rank."""
    options = parse_options(__doc__, arguments, "runs/accelerate_loop")
    accelerator = Accelerator(
        cpu=True, gradient_accumulation_steps=ACCUMULATION, log_with="tensorboard", project_dir=options.output
    )
    accelerator.init_trackers("tensorboard")

    model, processor = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    data = make_data(options.steps * ACCUMULATION * BATCH * accelerator.num_processes)
    collate, own = CaptionCollator(processor), torch.Generator()  # a loader draws a number when it begins
    loader = DataLoader(data, BATCH, collate_fn=collate, generator=own)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    torch.manual_seed(accelerator.process_index)

    checkpoint, start = options.output / "checkpoint", 0
    if options.resume:
        accelerator.load_state(checkpoint)
        start = int((checkpoint / "step.txt").read_text())

    # --- MIR ---
    monitor = MIRMonitor(
        model,
        make_probe(),
        processor=processor,
        optimizer=optimizer,
        output_dir=options.output,
        total_steps=options.steps,
        start_step=start,
        log=accelerator,
        every=2,
        stop=PlateauRule(),
    )
    # -----------

    step, losses = start, []
    for batch in accelerator.skip_first_batches(loader, start * ACCUMULATION):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        step += 1
        losses.append(loss.item())
        accelerator.log({"loss": loss.item()}, step=step)
        if step % SAVE_EVERY == 0:
            accelerator.save_state(checkpoint)
            (checkpoint / "step.txt").write_text(str(step))
        # --- MIR ---
        if monitor.step(step, loss=loss).stop:  # every rank
            break
        # -----------
    # --- MIR ---
    monitor.close()
    # -----------

    accelerator.end_training()
    if accelerator.is_main_process:
        say_where(options.output)
    return model, losses


if __name__ == "__main__":
    main()
