# SPDX-License-Identifier: Apache-2.0
"""What is tried once before the first evaluation, on samples of the probe.

Does a batch give each sample what it gets alone? If not, values would depend on the batch size. Some families pad
images to the largest of the batch before they encode them, count positions over the whole batch, or let a vision tower
attend to padding; some can't stack images of different sizes at all.

Does the model call the modules whose weights ranks gather together alike for every sample? If not, ranks with samples
of their own would wait for one another, or use weights that others have not sent. Some families call their tower once
for each image or tile. What a model decides by its weights (experts) is compared again after every evaluation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mir_callback import distributed
from mir_callback.config import MIRConfig
from mir_callback.errors import ForwardError, MIRError
from mir_callback.evaluation.forward import OutOfMemory, ProbePass, forward_probe
from mir_callback.evaluation.hidden_states import ExpectedRows
from mir_callback.evaluation.memory import PeakMemory
from mir_callback.model.sharding import record_gathers
from mir_callback.probe.batches import RankShard, encode_shards, modalities_of
from mir_callback.probe.encoding import Adapter
from mir_callback.probe.sample import TEXT, Sample

# How far rows may differ, relative to the norm of all, by the precision of the forwards: at least four times what they
# do behind 32 layers of random weights on a CPU, 1.1e-6 in float32, 5.4e-3 in bfloat16, 6.8e-4 in float16.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 3e-3}
_TENSOR_FLOAT = 3e-3  # float32 where convolutions may round to 10 bits, as float16 does
_TABLE = 4096  # most integers of a table
_SPREAD = 8  # samples of all lengths that are tried
_NOTHING = 1e-12  # GB of rows to keep


def unlike_pairs(samples: Sequence[Sample], sizes: Sequence[tuple[int, int, int]]) -> list[tuple[Sample, Sample]]:
    """Of samples that may share a batch the two that differ most. Ranks: pure.

    Those are the ones with the fewest and the most vision tokens and, if they are others, images.

    Args:
        samples: all that are measured.
        sizes: index, vision tokens and tokens of every sample; see :attr:`RankShard.sizes`.
    """
    groups: dict[frozenset[str], list[tuple[int, int, int, int]]] = {}
    for index, vision, tokens in sizes:
        images = sum(kind != TEXT for kind in samples[index].kinds)
        groups.setdefault(modalities_of(samples[index]), []).append((vision, images, tokens, index))
    ends: dict[tuple[int, int], None] = {}  # in order
    for group in groups.values():
        by_tokens = sorted((vision, tokens, index) for vision, _, tokens, index in group)
        by_images = sorted((images, vision, index) for vision, images, _, index in group)
        for order in (by_tokens, by_images) if by_images[0][0] < by_images[-1][0] else (by_tokens,):
            ends[order[0][-1], order[-1][-1]] = None
    return [(samples[least], samples[most]) for least, most in ends if least != most]


def find_encoding_fault(pair: Sequence[Sample], max_text_tokens: int, adapter: Adapter) -> str | None:
    """Why the adapter can't encode two samples as one batch, or encodes them otherwise than alone; None if it can.

    An error of a sample alone is raised. Ranks: any, each for itself.
    """
    alone = _encode(pair, max_text_tokens, adapter, 1)
    try:
        together = _encode(pair, max_text_tokens, adapter, 2)
    except MIRError as error:
        return str(error)
    for name, *ids in zip((sample.name for sample in pair), alone.token_ids, together.token_ids, strict=True):
        if not torch.equal(*ids):
            return f"{name} has {len(ids[1])} tokens beside another sample and {len(ids[0])} alone, or others"
    if alone.sizes != together.sizes:
        return f"vision tokens are {together.sizes} in a batch, and {alone.sizes} alone"
    return None


def signature_of(inputs: Mapping[str, Any]) -> str:
    """What of a single sample's inputs may decide which modules a model calls, as a hash. Ranks: pure.

    Shapes of all that is no sequence of tokens, and small tables of integers, as of image grids.
    """
    sequence = tuple(inputs["input_ids"].shape) if "input_ids" in inputs else None

    def describe(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [describe(each) for each in value]
        if not isinstance(value, Tensor):
            return repr(value)
        if tuple(value.shape) == sequence:
            return None
        is_table = not value.is_floating_point() and value.numel() <= _TABLE
        return tuple(value.shape), value.tolist() if is_table else None

    words = repr([(name, describe(inputs[name])) for name in sorted(inputs)])
    return hashlib.sha256(words.encode()).hexdigest()


def choose_representatives(samples: Sequence[Sample], signed: Sequence[tuple[int, str, int]]) -> list[list[Sample]]:
    """Samples that show how the model calls its modules, those of the same modalities together. Ranks: pure.

    One of each signature, and a few of all lengths.

    Args:
        samples: all that are measured.
        signed: index, signature and tokens of every sample; see :func:`signature_of`.
    """
    groups: dict[frozenset[str], list[tuple[int, str, int]]] = {}
    for tokens, signature, index in sorted((tokens, signature, index) for index, signature, tokens in signed):
        groups.setdefault(modalities_of(samples[index]), []).append((index, signature, tokens))
    found = []
    for group in groups.values():
        firsts = {signature: index for index, signature, _ in reversed(group)}
        step = max(1, (len(group) - 1) // (_SPREAD - 1))
        chosen = {*firsts.values(), *(index for index, _, _ in group[::step])}
        found.append([samples[index] for index in sorted(chosen)])
    return found


@dataclass(frozen=True)
class Trial:
    """Forwards of some samples, of which no rows are kept afterwards.

    Ranks: collective; the same forwards and the same results on every rank.
    """

    model: nn.Module
    max_text_tokens: int
    adapter: Adapter
    config: MIRConfig
    ranks_here: int
    optimizer: Any
    bar: tqdm
    peak: PeakMemory

    def find_forward_fault(self, pair: Sequence[Sample]) -> str | OutOfMemory | None:
        """What the model makes otherwise of two samples in a batch than of each alone, in words; None if nothing.

        Rows of the first and the last layer are compared. A failure of the batch alone is a fault; one of a single
        sample is raised.
        """
        names = " and ".join(sample.name for sample in pair)
        passes: list[ProbePass] = []
        for batch_size in (1, 2):
            try:
                passed = self._forward(pair, batch_size, budget=None)
            except ForwardError as error:
                if batch_size == 1:
                    raise
                return str(error)
            if not isinstance(passed, ProbePass):
                return passed
            passes.append(passed)
        with distributed.fail_together():
            own = _compare(*passes)
        worst, allowed = max(distributed.gather_objects(own))
        if worst <= allowed:
            return None
        return f"hidden states of {names} differ by {worst:.1e} of their norm from those of each sample alone"

    def find_unlike_calls(self, alike: Sequence[Sample]) -> str | None:
        """Of samples alone, two for which ranks would gather weights unequally often, in words; None if all agree."""
        with record_gathers(self.model) as calls:
            passed = self._forward(alike, 1, budget=_NOTHING)
        if not isinstance(passed, ProbePass):
            return "memory did not suffice to try samples alone"
        own = calls[-len(alike) :]  # without those that try packed attention before
        found = None
        unlike = next((at for at, called in enumerate(own) if called != own[0]), None)
        if unlike is not None:
            names, counts = f"{alike[0].name} and {alike[unlike].name}", f"{len(own[0])} and {len(own[unlike])}"
            found = f"{names} call modules whose weights ranks gather unequally ({counts} calls)"
        return next(filter(None, distributed.gather_objects(found)), None)

    def _forward(self, samples: Sequence[Sample], batch_size: int, *, budget: float | None) -> ProbePass | OutOfMemory:
        batches = _encode(samples, self.max_text_tokens, self.adapter, batch_size).batches
        config = replace(self.config, probe_loss=False, vision_gain=False, capture_budget_gb=budget)
        known = (ExpectedRows(None, exact=False), config, self.ranks_here)
        return forward_probe(self.model, self.adapter, batches, (), *known, 0, self.optimizer, self.bar, self.peak)


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
    size = own.double().norm().clamp_min(1e-30)
    difference = float((batched.double() - own.double()).norm() / size)
    # The evaluation itself names a sample that is not finite alone.
    return difference if math.isfinite(difference) else float("inf") if bool(size.isfinite()) else 0.0


def _encode(samples: Sequence[Sample], max_text_tokens: int, adapter: Adapter, batch_size: int) -> RankShard:
    chosen = [(index, True) for index in range(len(samples))]
    return encode_shards(samples, max_text_tokens, adapter, chosen, batch_size)[0]
