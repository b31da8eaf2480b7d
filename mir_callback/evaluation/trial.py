# SPDX-License-Identifier: Apache-2.0
"""What is tried once, on the samples that differ most, before the first evaluation.

Does a batch give each sample what it gets alone? If not, values would depend on the batch size. Some families pad
images to the largest of the batch before they encode them, count positions over the whole batch, or let a vision tower
attend to padding; some can't stack images of different sizes at all.

Does the model call the modules whose weights ranks gather together alike for every sample? If not, ranks with samples
of their own would wait for one another. Some families call their tower once for each image or tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mir_callback import distributed
from mir_callback.config import MIRConfig
from mir_callback.errors import ForwardError, MIRError
from mir_callback.evaluation.forward import ProbePass, forward_probe
from mir_callback.evaluation.hidden_states import ExpectedRows
from mir_callback.evaluation.memory import PeakMemory
from mir_callback.model.parallelism import SampleShare
from mir_callback.model.sharding import record_gathers
from mir_callback.probe.batches import EncodedProbe, encode_probe, modalities_of
from mir_callback.probe.encoding import Adapter
from mir_callback.probe.probe import Probe, Sample

# How far rows may differ, relative to the norm of all, by the precision of the forwards: at least four times what they
# do behind 32 layers of random weights on a CPU, 1.1e-6 in float32, 5.4e-3 in bfloat16, 6.8e-4 in float16.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 3e-3}
_TENSOR_FLOAT = 3e-3  # float32 where convolutions may round to 10 bits, as float16 does


@dataclass(frozen=True)
class Trial:
    """What the forwards of two unlike samples have shown; in words, or None if nothing."""

    unlike_alone: str | None = None  # how rows of a batch differ from those of each sample alone
    unlike_calls: str | None = None  # how often the two samples call modules whose weights are gathered


def unlike_pairs(samples: Sequence[Sample], max_text_tokens: int, sizes: Sequence[tuple[int, int, int]]) -> list[Probe]:
    """Of samples with the same modalities the two that differ most, as probes. Ranks: pure.

    Those are the ones with the fewest and the most vision tokens and, if they are others, images.

    Args:
        samples: all that are measured.
        max_text_tokens: of the probe.
        sizes: index, vision tokens and tokens of every sample; see :attr:`RankShard.sizes`.
    """
    groups: dict[frozenset[str], list[tuple[int, int, int, int]]] = {}
    for index, vision, tokens in sizes:
        if samples[index].has_vision:
            images = sum(kind != "text" for kind in samples[index].kinds)
            groups.setdefault(modalities_of(samples[index]), []).append((vision, images, tokens, index))
    ends: dict[tuple[int, int], None] = {}  # in order
    for group in groups.values():
        by_tokens = sorted((vision, tokens, index) for vision, _, tokens, index in group)
        by_images = sorted((images, vision, index) for vision, images, _, index in group)
        for order in (by_tokens, by_images) if by_images[0][0] < by_images[-1][0] else (by_tokens,):
            ends[order[0][-1], order[-1][-1]] = None
    pairs = [(samples[least], samples[most]) for least, most in ends if least != most]
    return [Probe(pair, max_text_tokens) for pair in pairs]


def find_encoding_fault(pair: Probe, adapter: Adapter) -> str | None:
    """Why the adapter can't encode two samples as one batch, or encodes them otherwise than alone; None if it can.

    An error of a sample alone is raised. Ranks: any, each for itself.
    """
    alone = _encode(pair, adapter, 1)
    try:
        together = _encode(pair, adapter, 2)
    except MIRError as error:
        return str(error)
    for name, *ids in zip(
        (sample.name for sample in pair.samples), alone.shard.token_ids, together.shard.token_ids, strict=True
    ):
        if not torch.equal(*ids):
            return f"{name} has {len(ids[1])} tokens beside another sample and {len(ids[0])} alone, or others"
    if alone.shard.sizes != together.shard.sizes:
        return f"vision tokens are {together.shard.sizes} in a batch, and {alone.shard.sizes} alone"
    return None


def try_forwards(
    model: nn.Module,
    pair: Probe,
    adapter: Adapter,
    config: MIRConfig,
    ranks_here: int,
    optimizer: Any,
    bar: tqdm,
    peak: PeakMemory,
    *,
    batched: bool,
) -> Trial:
    """Forward two samples alone and, if ``batched``, in a batch, and compare rows of the first and the last layer.

    What memory does not suffice for is not compared: the evaluation itself says so then.

    Ranks: collective; the same forwards and the same result on every rank.
    """
    names = " and ".join(sample.name for sample in pair.samples)
    passes: list[ProbePass] = []
    unlike_calls: str | None = None
    for batch_size in (1, 2) if batched else (1,):
        batches = _encode(pair, adapter, batch_size).batches
        known = (ExpectedRows(None, exact=False), config, ranks_here)
        try:
            with record_gathers(model) as gathers:
                passed = forward_probe(model, adapter, batches, (), *known, 0, optimizer, bar, peak)
        except ForwardError as error:
            if batch_size == 1:
                raise
            return Trial(str(error), unlike_calls)
        if not isinstance(passed, ProbePass):
            break
        if batch_size == 1:
            unlike_calls = _compare_calls(names, gathers[-2:])  # the last two, after those that try packed attention
        if passed.layers:
            passes.append(passed)
    unlike_alone = None
    worst, allowed = max(distributed.gather_objects(_compare(*passes) if len(passes) == 2 else (0.0, 0.0)))
    if worst > allowed:
        unlike_alone = f"hidden states of {names} differ by {worst:.1e} of their norm from those of each sample alone"
    return Trial(unlike_alone, unlike_calls)


def _compare_calls(names: str, calls: Sequence[Sequence[int]]) -> str | None:
    found = None
    if len({tuple(each) for each in calls}) > 1:
        counts = " and ".join(str(len(each)) for each in calls)
        found = f"{names} take {counts} calls of modules whose weights ranks gather, or others"
    return next(filter(None, distributed.gather_objects(found)), None)


def _compare(alone: ProbePass, together: ProbePass) -> tuple[float, float]:
    """How far rows of the first and the last layer differ, relative to the norm of all, and how far they may."""
    last = min(alone.layers[-1], together.layers[-1])  # memory may have sufficed for fewer layers in one of them
    layers = [range(layer, layer + 1) for layer in sorted({0, last})]
    rows = [both for layer in layers for both in zip(together.take(layer)[0], alone.take(layer)[0], strict=True)]
    dtype, device = rows[0][1].dtype, rows[0][1].device.type
    allowed = _TENSOR_FLOAT if dtype == torch.float32 and device != "cpu" else _TOLERANCE.get(dtype, 0.02)
    return max(_difference(*both) for both in rows), allowed


def _difference(batched: Tensor, own: Tensor) -> float:
    if batched.shape != own.shape:
        return float("inf")
    return float((batched.double() - own.double()).norm() / own.double().norm().clamp_min(1e-30))


def _encode(pair: Probe, adapter: Adapter, batch_size: int) -> EncodedProbe:
    return encode_probe(pair, adapter, share=SampleShare(), batch_size=batch_size)
