# SPDX-License-Identifier: Apache-2.0
"""A whole evaluation against the bare forward of its probe, on a LLaVA with random weights.

    python benchmarks/evaluation.py                                       # small, for a CPU
    python benchmarks/evaluation.py --device cuda --dtype bfloat16 --hidden 4096 --layers 32 --samples 100 --text 900

Bare forwards (no gradient, no cache, logits of one position) and evaluations run alternately; the table shows medians,
the median of the ratios, and the memory an evaluation needs beyond the model.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mir_callback import Probe
from mir_callback.evaluation import encode_for, evaluate_encoded
from mir_callback.model.modality import modality_masks
from mir_callback.probe.adapter import AdaptedBatch, LiveMasks
from mir_callback.probe.samples import Sample

VOCABULARY = 32064
IMAGE_ID = VOCABULARY - 1
PIXELS, PATCH = 336, 14
IMAGE_TOKENS = (PIXELS // PATCH) ** 2


class RandomTokens:
    """Samples of random token ids and pixels: what is in them does not matter for the time."""

    def __init__(self, text_tokens: int) -> None:
        self._text_tokens = text_tokens

    def encode(self, samples: Sequence[Sample], max_text_tokens: int) -> AdaptedBatch:
        """See :class:`mir_callback.probe.adapter.Adapter`."""
        rows, pixels = [], []
        for sample in samples:
            rng = torch.Generator().manual_seed(int(sample.text))
            text = torch.randint(5, IMAGE_ID, (self._text_tokens,), generator=rng)
            rows.append(torch.cat([torch.tensor([1]), torch.full((IMAGE_TOKENS,), IMAGE_ID), text]))
            pixels.append(torch.randn(3, PIXELS, PIXELS, generator=rng))
        ids = torch.stack(rows)
        attention = torch.ones_like(ids)
        inputs = {"input_ids": ids, "attention_mask": attention, "pixel_values": torch.stack(pixels)}
        return AdaptedBatch(inputs, modality_masks(ids, attention, (IMAGE_ID,)), rows)

    def live_masks(self, model: nn.Module) -> AbstractContextManager[LiveMasks | None]:
        """See :class:`mir_callback.probe.adapter.Adapter`."""
        return nullcontext()


def build(hidden: int, layers: int, tower_layers: int, device: str, dtype: torch.dtype) -> Any:
    """A LLaVA with the proportions of LLaVA-1.5 and random weights."""
    tower = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=tower_layers,
        num_attention_heads=16,
        image_size=PIXELS,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        vocab_size=VOCABULARY,
    )
    config = LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=IMAGE_ID, image_seq_length=IMAGE_TOKENS
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlavaForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


def seconds(call: Callable[[], Any]) -> tuple[float, Any]:
    """Wall seconds and result of one call, all work on the device included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tower-layers", type=int, help="default: 24 on a GPU, 2 on a CPU")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--text", type=int, default=300, help="text tokens a sample")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    tower_layers = options.tower_layers or (2 if options.device == "cpu" else 24)
    model = build(options.hidden, options.layers, tower_layers, options.device, dtype)
    probe = Probe.from_pairs([(Image.new("RGB", (4, 4)), str(index)) for index in range(options.samples)])
    adapter = RandomTokens(options.text)
    encoded = encode_for(model, probe, adapter, batch_size=options.batch_size)

    @torch.no_grad()
    def bare() -> None:
        for batch in encoded.batches:
            model(**batch.on(torch.device(options.device), dtype).inputs, use_cache=False, logits_to_keep=1)

    forwards, evaluations, ratios, memory = [], [], [], []
    for repeat in range(options.repeats + 1):
        print(f"run {repeat} of {options.repeats}", file=sys.stderr)
        forward, _ = seconds(bare)
        on_gpu = options.device != "cpu"
        held = 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        evaluation, report = seconds(lambda: evaluate_encoded(model, encoded, adapter, progress=False))
        if repeat == 0:  # warm-up
            continue
        forwards.append(forward)
        evaluations.append(evaluation)
        ratios.append(evaluation / forward)
        memory.append((torch.cuda.max_memory_allocated() - held) / 2**30 if on_gpu else float("nan"))
    name = torch.cuda.get_device_name() if options.device != "cpu" else f"{torch.get_num_threads()} CPU threads"
    lines = [
        f"{name}, Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion random weights, "
        f"{options.dtype}; medians of {options.repeats} alternating runs",
        "",
        "| hidden | layers | vision tokens | text tokens | bare forward (s) | evaluation (s) | ratio | more GiB |",
        "|---|---|---|---|---|---|---|---|",
        f"| {options.hidden} | {options.layers} | {report.num_vision_tokens} | {report.num_text_tokens} "
        f"| {statistics.median(forwards):.2f} | {statistics.median(evaluations):.2f} "
        f"| {statistics.median(ratios):.2f} | {statistics.median(memory):.1f} |",
    ]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("\n".join(["`" + " ".join(["python", *sys.argv]) + "`", "", *lines]) + "\n")


if __name__ == "__main__":
    main()
