# SPDX-License-Identifier: Apache-2.0
"""Stage 1 of a LLaVA of real size under DeepSpeed, with MIR and without: is training the same, and what does MIR cost?

    python -m torch.distributed.run --standalone --nproc_per_node 1 benchmarks/training.py --hidden 4096 --layers 32 \
      --samples 100 --text 900 --stages 2 3

Weights and data are random, the projector alone is trained, in bfloat16. The table says for each ZeRO stage whether all
logged losses and gradient norms and the trained projector are the same to the last bit, how long a step and an
evaluation take, and how MIR moves.
"""

from __future__ import annotations

import gc
import hashlib
import os
import statistics
import tempfile
import time
from typing import Any

import deepspeed
import torch
from measuring import machine, options_of, publish, table
from PIL import Image
from random_llava import IMAGE_TOKENS, RandomTokens, build
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from mir_callback import MIRCallback, Probe
from mir_callback.probe.probe import Sample

OPTIONS: dict[str, dict[str, Any]] = {
    "hidden": {"type": int, "default": 256},
    "layers": {"type": int, "default": 4},
    "tower_layers": {"type": int, "help": "default: 24 on a GPU, 2 on a CPU"},
    "samples": {"type": int, "default": 4},
    "text": {"type": int, "default": 64, "help": "text tokens of a probe sample"},
    "train_text": {"type": int, "default": 64, "help": "text tokens of a training sample"},
    "train_batch": {"type": int, "default": 2},
    "steps": {"type": int, "default": 6},
    "every": {"type": int, "default": 3},
    "stages": {"type": int, "nargs": "+", "default": [2]},
}


class RandomCaptions(torch.utils.data.Dataset[dict[str, Any]]):
    """Training samples, other ones than the probe's."""

    def __init__(self, count: int, text_tokens: int) -> None:
        self._count, self._adapter = count, RandomTokens(text_tokens)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self._adapter.encode([Sample.pair("", b"", str(10_000 + index))], 0)
        inputs = {name: tensor[0] for name, tensor in batch.inputs.items()}
        labels = inputs["input_ids"].clone()
        labels[: IMAGE_TOKENS + 1] = -100
        return {**inputs, "labels": labels}


class StepClock(TrainerCallback):
    """Seconds of each optimizer step, everything between steps left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._began = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Read it."""
        self.seconds.append(self._now() - self._began)

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def train(options: Any, stage: int, watched: bool) -> tuple[list[Any], str, StepClock, MIRCallback]:
    """One run; its losses and gradient norms, a digest of the trained projector, and the clocks."""
    unset_hf_deepspeed_config()  # of the run before
    on_gpu = torch.cuda.is_available()
    layers = options.tower_layers or (24 if on_gpu else 2)
    # Before the arguments: they would have transformers draw other weights, shard by shard, under ZeRO-3.
    model = build(options.hidden, options.layers, layers, "cuda" if on_gpu else "cpu", torch.bfloat16)
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.train_batch,
            learning_rate=1e-3,
            bf16=True,
            use_cpu=not on_gpu,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            deepspeed={
                "zero_optimization": {"stage": stage},
                "bf16": {"enabled": True},
                "train_micro_batch_size_per_gpu": "auto",
                "train_batch_size": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
            },
        )
        data = RandomCaptions(options.steps * options.train_batch * args.world_size, options.train_text)
        clock = StepClock()
        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[clock])
        probe = Probe.from_pairs([(Image.new("RGB", (4, 4)), str(index)) for index in range(options.samples)])
        callback = MIRCallback(probe, adapter=RandomTokens(options.text), every=options.every, save_probe=False)
        if watched:
            callback.attach(trainer)
        trainer.train()
        with deepspeed.zero.GatheredParameters(list(projector.parameters()), enabled=stage == 3):
            weights = b"".join(each.detach().float().cpu().numpy().tobytes() for each in projector.parameters())
        log = [(row["step"], row["loss"], row.get("grad_norm")) for row in trainer.state.log_history if "loss" in row]
        del trainer, model, projector
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return log, hashlib.sha256(weights).hexdigest()[:12], clock, callback


def main() -> None:
    """Print the table, and write it where asked."""
    options = options_of(__doc__, **OPTIONS)
    if not torch.cuda.is_available():
        deepspeed.init_distributed(dist_backend="gloo")
    rows = []
    for stage in options.stages:
        log, digest, clock, _ = train(options, stage, watched=False)
        log_mir, digest_mir, clock_mir, callback = train(options, stage, watched=True)
        history = callback.history
        step = statistics.median(clock.seconds[1:])
        seconds = statistics.median(record.seconds for record in history[1:])
        peak = max(record.peak_memory_bytes or 0 for record in history)
        rows.append(
            [
                f"ZeRO-{stage}",
                "yes" if (log, digest) == (log_mir, digest_mir) else "NO",
                f"{step:.2f}",
                f"{statistics.median(clock_mir.seconds[1:]):.2f}",
                f"{seconds:.2f}",
                f"{seconds / step:.1f}",
                f"{peak / 2**30:.1f}",
                ", ".join(f"{record.mir:.4f} (step {record.step})" for record in history),
            ]
        )
    if int(os.environ.get("RANK", "0")) == 0:
        tokens = f"{history[-1].num_vision_tokens} vision and {history[-1].num_text_tokens} text tokens"
        where = f"{machine('transformers', 'deepspeed')}; {os.environ.get('WORLD_SIZE', '1')} rank(s), bfloat16"
        head = ["", "same to the last bit", "step (s)", "step with MIR (s)", "evaluation (s)", "in steps", "more GiB"]
        size = f"hidden {options.hidden}, {options.layers} layers, batches of {options.train_batch}"
        what = f"{where}; {size}; probe of {options.samples} samples, {tokens}"
        publish(options.output, what, table([*head, "MIR"], rows))


if __name__ == "__main__":
    main()
