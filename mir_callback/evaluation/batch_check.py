# SPDX-License-Identifier: Apache-2.0
"""Does a batch give each sample what it gets alone? If not, values would depend on the batch size.

Some families pad images to the largest of the batch before they encode them, count positions over the whole batch, or
let a vision tower attend to padding; some can't stack images of different sizes at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mir_callback import distributed
from mir_callback.config import MIRConfig
from mir_callback.errors import MIRError
from mir_callback.evaluation.forward import ProbePass, forward_probe
from mir_callback.evaluation.hidden_states import ExpectedRows
from mir_callback.evaluation.memory import PeakMemory
from mir_callback.model.parallelism import SampleShare
from mir_callback.probe.batches import EncodedProbe, encode_probe, modalities_of
from mir_callback.probe.encoding import Adapter
from mir_callback.probe.probe import Probe, Sample

# How far rows may differ, relative to the norm of all, by the precision of the forwards.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.01}
_TENSOR_FLOAT = 3e-3  # float32 where convolutions may round to 10 bits


def unlike_pairs(samples: Sequence[Sample], max_text_tokens: int, sizes: Sequence[tuple[int, int, int]]) -> list[Probe]:
    """Of samples that share batches, those with the same modalities, the two that differ most, as probes. Ranks: pure.

    Args:
        samples: all that are measured.
        max_text_tokens: of the probe.
        sizes: index, vision tokens and tokens of every sample; see :attr:`RankShard.sizes`.
    """
    groups: dict[frozenset[str], list[int]] = {}
    for _, _, index in sorted((vision, tokens, index) for index, vision, tokens in sizes):
        if samples[index].has_vision:
            groups.setdefault(modalities_of(samples[index]), []).append(index)
    ends = [(order[0], order[-1]) for order in groups.values() if len(order) > 1]
    return [Probe((samples[least], samples[most]), max_text_tokens) for least, most in ends]


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


def find_forward_fault(
    model: nn.Module,
    pair: Probe,
    adapter: Adapter,
    config: MIRConfig,
    ranks_here: int,
    optimizer: Any,
    bar: tqdm,
    peak: PeakMemory,
) -> str | None:
    """What the model's layers make otherwise of two samples in a batch than of each alone; None if nothing.

    Compares the first and the last layer. None also if memory runs out: the evaluation itself says so then.

    Ranks: collective; the same on every rank.
    """
    passes: list[ProbePass] = []
    for batch_size in (2, 1):
        batches = _encode(pair, adapter, batch_size).batches
        known = (ExpectedRows(None, exact=False), config, ranks_here)
        passed = forward_probe(model, adapter, batches, (), *known, 0, optimizer, bar, peak)
        if not isinstance(passed, ProbePass) or not passed.layers:
            return None
        passes.append(passed)
    last = min(passed.layers[-1] for passed in passes)  # memory may have sufficed for fewer layers in one of them
    together, alone = ([passed.take(range(layer, layer + 1))[0] for layer in sorted({0, last})] for passed in passes)
    rows = [both for layers in zip(together, alone, strict=True) for both in zip(*layers, strict=True)]
    worst = max(distributed.gather_objects(max(_difference(*both) for both in rows)))
    dtype, device = together[0][0].dtype, together[0][0].device.type
    allowed = _TENSOR_FLOAT if dtype == torch.float32 and device != "cpu" else _TOLERANCE.get(dtype, 0.06)
    if worst <= allowed:
        return None
    names = " and ".join(sample.name for sample in pair.samples)
    return f"hidden states of {names} differ by {worst:.1e} of their norm from those of each sample alone"


def _difference(batched: Tensor, own: Tensor) -> float:
    if batched.shape != own.shape:
        return float("inf")
    return float((batched.double() - own.double()).norm() / own.double().norm().clamp_min(1e-30))


def _encode(pair: Probe, adapter: Adapter, batch_size: int) -> EncodedProbe:
    return encode_probe(pair, adapter, share=SampleShare(), batch_size=batch_size)
