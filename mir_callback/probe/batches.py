# SPDX-License-Identifier: Apache-2.0
"""A probe as model inputs: the batches that one rank forwards, and fingerprints of the encoded samples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from mir_callback.errors import ProbeError
from mir_callback.model.modality import COUNT, LEAVE_OUT, ModalityMasks
from mir_callback.model.parallelism import SampleShare
from mir_callback.probe.adapters import Adapter, cut_text
from mir_callback.probe.probe import Probe
from mir_callback.probe.sample import Sample, measured_samples

# A changed setting of the image processor shows in any image, so it is enough to encode a few, one by one.
_PIXEL_SAMPLES = 4


@dataclass(frozen=True)
class ProbeBatch:
    """The samples of one forward, on the CPU; see :class:`AdaptedBatch`."""

    inputs: dict[str, Any]
    masks: ModalityMasks | None
    keep: Tensor  # (B,) bool, False for repeated samples that give every rank equally many batches
    names: tuple[str, ...]  # (B,), of the samples
    text_ids: list[Tensor] | None = None

    def on(self, device: torch.device, dtype: torch.dtype | None) -> ProbeBatch:
        """The batch on ``device``, floating inputs in ``dtype`` if one is given."""

        def moved(value: Any) -> Any:
            if isinstance(value, list):
                return [moved(item) for item in value]
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype=dtype if value.is_floating_point() else None)

        inputs = {name: moved(value) for name, value in self.inputs.items()}
        masks = self.masks
        if masks is not None:
            masks = ModalityMasks(masks.vision.to(device), masks.text.to(device))
        return replace(self, inputs=inputs, masks=masks, keep=self.keep.to(device))


@dataclass(frozen=True)
class RankShard:
    """The part of a probe that one rank forwards."""

    samples: Sequence[tuple[int, bool]]  # (index among those measured, keep), see samples_of
    batch_size: int
    batches: tuple[ProbeBatch, ...]  # of these samples in this order, equally many on every rank
    token_ids: tuple[Tensor, ...]  # the real token ids of each of these samples

    @property
    def kept(self) -> list[int]:
        """Indices, among the samples measured, of those whose rows this rank keeps."""
        return [index for index, keep in self.samples if keep]

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        """Of each kept sample its place in the probe, its vision tokens (0 if only a forward shows them) and tokens."""
        vision = [
            int(count)
            for batch in self.batches
            for count in (torch.zeros(len(batch.keep)) if batch.masks is None else batch.masks.vision.sum(dim=1))
        ]
        known = zip(self.samples, vision, map(len, self.token_ids), strict=True)
        return [(index, count, tokens) for (index, keep), count, tokens in known if keep]

    @property
    def row_counts(self) -> tuple[int, int] | None:
        """Vision and text tokens of the kept samples, or None if only a forward shows them."""
        masks = [(batch.masks, batch.keep) for batch in self.batches]
        vision = [int(mask.vision[keep].sum()) for mask, keep in masks if mask is not None]
        text = [int(mask.text[keep].sum()) for mask, keep in masks if mask is not None]
        return (sum(vision), sum(text)) if len(vision) == len(masks) else None


@dataclass(frozen=True)
class EncodedProbe:
    """A probe, encoded for one model and processor.

    Digests are of this rank's samples; the Evaluator replaces them by those of all ranks.
    """

    shard: RankShard
    other_images: RankShard | None  # the same texts with other images, for vision_gain
    samples: Sequence[Sample]  # of the whole probe, those that are measured
    fingerprint: str  # the probe's
    digests: tuple[tuple[int, str], ...]  # (sample index, digest of its token ids)
    pixel_digests: tuple[tuple[int, str], ...]  # (sample index, digest of its floating inputs), of a few samples

    @property
    def num_samples(self) -> int:
        """Samples of the whole probe that are measured."""
        return len(self.samples)

    @property
    def batches(self) -> tuple[ProbeBatch, ...]:
        """This rank's batches."""
        return self.shard.batches

    @property
    def tokens_fingerprint(self) -> str:
        """Hash of the token ids of the samples in ``digests``; 16 hexadecimal digits."""
        return _fingerprint(self.digests)

    @property
    def pixels_fingerprint(self) -> str:
        """Hash of the floating inputs of the samples in ``pixel_digests``; 16 hexadecimal digits.

        It changes with the settings of the image processor, but may also change with the version of an image library:
        a reason for a warning, not for an error.
        """
        return _fingerprint(self.pixel_digests)


def samples_of(share: SampleShare, samples: Sequence[Sample], *, everywhere: bool = False) -> list[tuple[int, bool]]:
    """The samples that a rank encodes: (sample index, keep), equally many on every rank; ``everywhere`` all of them.

    Samples of the same modalities come together, those without an image last, so that all ranks call a model's towers
    alike: sharded weights are gathered for each call. Of each such group sample i belongs to part i mod parts, and a
    part that has fewer repeats the group's first sample, with keep False. Only the leader of its ranks keeps any.
    """
    groups: dict[frozenset[str], list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(modalities_of(sample), []).append(index)
    found: list[tuple[int, bool]] = []
    for group in sorted(groups.values(), key=lambda group: not samples[group[0]].has_vision):
        if everywhere:
            found += [(index, share.leads and at % share.parts == share.part) for at, index in enumerate(group)]
            continue
        length = -(-len(group) // share.parts)
        mine = group[share.part :: share.parts]
        found += [(index, share.leads) for index in mine] + [(group[0], False)] * (length - len(mine))
    return found


def modalities_of(sample: Sample) -> frozenset[str]:
    """What samples of one batch have in common: image, video, text. Ranks: pure."""
    return frozenset(sample.kinds)


def encode_shards(
    samples: Sequence[Sample],
    max_text_tokens: int,
    adapter: Adapter,
    chosen: Sequence[tuple[int, bool]],
    batch_size: int,
    *,
    other_images: bool = False,
) -> tuple[RankShard, RankShard | None]:
    """Encode a rank's samples in batches of ``batch_size``; with ``other_images`` also their texts with other images.

    A batch has samples of the same modalities. For another batch size they are encoded again, as only the processor
    knows which part of its output belongs to which sample. Errors and ranks as of :func:`encode_probe`.
    """

    def encode(every: Sequence[Sample]) -> RankShard:
        batches: list[ProbeBatch] = []
        token_ids: list[Tensor] = []
        for _, alike in groupby(chosen, key=lambda each: modalities_of(every[each[0]])):
            group = list(alike)
            for start in range(0, len(group), batch_size):
                part = group[start : start + batch_size]
                encoded = [every[index] for index, _ in part]
                adapted = adapter.encode(encoded, max_text_tokens)
                keep, names = torch.tensor([kept for _, kept in part]), tuple(sample.name for sample in encoded)
                batches.append(ProbeBatch(adapted.inputs, adapted.masks, keep, names, adapted.text_ids))
                token_ids += adapted.token_ids
        return RankShard(chosen, batch_size, tuple(batches), tuple(token_ids))

    shard = encode(samples)
    if not other_images:
        return shard, None
    others = encode(exchange_images(samples))
    for ours, theirs in zip(shard.batches, others.batches, strict=True):
        if ours.text_ids is None or theirs.text_ids is None:
            continue  # refused by the caller
        for name, own, other in zip(ours.names, ours.text_ids, theirs.text_ids, strict=True):
            if not torch.equal(own, other):
                raise ProbeError(
                    f"vision_gain needs the same text with any image, but {type(adapter).__name__} gives {name} "
                    f"{len(own)} text tokens with its own image and {len(other)} or others with another. Set "
                    "vision_gain=False."
                )
    return shard, others


def exchange_images(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with one another's images: each image is used as often as before, and never for its own sample.

    All images and videos of a sample go together to another sample of the same layout. Samples with the same images are
    put together, in the order of their first ones, and shifted by the size of the largest such group: by one if all
    differ. ProbeError if one of them has more than half of the samples of its layout, or a sample has none.
    Ranks: pure.
    """
    layouts: dict[tuple[str, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        layouts.setdefault(sample.kinds, []).append(index)
    found = list(samples)
    for alike in layouts.values():
        _exchange_alike(samples, alike, found)
    return found


def _exchange_alike(samples: Sequence[Sample], alike: Sequence[int], found: list[Sample]) -> None:
    """Exchange the images of the samples at ``alike``, which have one layout, in ``found``."""
    first = samples[alike[0]]
    if not first.has_vision:
        raise ProbeError(
            f"vision_gain exchanges the images of samples, and {first.name} has none. Set text_only='leave_out', or "
            "vision_gain=False."
        )
    groups: dict[bytes, list[int]] = {}
    for index in alike:
        pixels = hashlib.sha256()
        for image in samples[index].open_images():
            pixels.update(f"{image.size}".encode() + image.tobytes())
        groups.setdefault(pixels.digest(), []).append(index)
    largest = max(map(len, groups.values()))
    if len(alike) == 1 < len(samples):
        raise ProbeError(
            f"vision_gain exchanges images between samples of the same layout, and no other sample holds images and "
            f"texts in the order of {first.name} ({first.describe()}). Leave it out, or set vision_gain=False."
        )
    if 2 * largest > len(alike):
        of = "" if len(alike) == len(samples) else f" of the layout of {first.name}"
        raise ProbeError(
            f"vision_gain exchanges the images of samples, but {largest} of the {len(alike)} samples{of} have the same "
            "image. Add samples with others, or set vision_gain=False."
        )
    order = [index for group in groups.values() for index in group]
    for place, index in enumerate(order):
        here, other = samples[index], samples[order[(place + largest) % len(order)]]
        visions = iter([part for part in other.parts if not isinstance(part, str)])
        parts = tuple(part if isinstance(part, str) else next(visions) for part in here.parts)
        found[index] = Sample(f"{here.name} with the image of {other.name}", parts)


def encode_probe(
    probe: Probe,
    adapter: Adapter,
    *,
    share: SampleShare,
    batch_size: int,
    other_images: bool = False,
    text_only: str = LEAVE_OUT,
) -> EncodedProbe:
    """Encode one rank's part of a probe, in equally many batches on every rank; see :func:`encode_shards`.

    ConfigError if the processor cannot batch, ProbeError if a sample does not fit the model. Ranks: any; no
    communication.
    """
    samples = [probe.samples[place] for place in measured_samples(probe.samples, text_only == COUNT)]
    cut, chosen = probe.max_text_tokens, samples_of(share, samples)
    shard, others = encode_shards(samples, cut, adapter, chosen, batch_size, other_images=other_images)
    kept = [(index, ids) for (index, keep), ids in zip(shard.samples, shard.token_ids, strict=True) if keep]
    pixels = [(index, samples[index]) for index, _ in kept if index < _PIXEL_SAMPLES]
    return EncodedProbe(
        shard,
        others,
        samples,
        probe.fingerprint,
        digests=tuple((index, _digest(ids)) for index, ids in kept),
        pixel_digests=tuple((index, _pixel_digest(adapter, each, cut)) for index, each in pixels),
    )


def _digest(token_ids: Tensor) -> str:
    """Hash of one sample's token ids without padding; the same in any batch, with any padding side, on any rank."""
    return hashlib.sha256(token_ids.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


def _pixel_digest(adapter: Adapter, sample: Sample, max_text_tokens: int) -> str:
    """Hash of one sample's floating inputs, encoded alone, so that it does not depend on the rest of a batch."""
    joined = hashlib.sha256()
    inputs = adapter.encode([sample], max_text_tokens).inputs
    for name in sorted(inputs):
        for tensor in _floating(inputs[name]):
            joined.update(f"{name} {tuple(tensor.shape)}".encode())
            joined.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return joined.hexdigest()


def _floating(value: Any) -> list[Tensor]:
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _floating(item)]
    return [value] if isinstance(value, Tensor) and value.is_floating_point() else []


def _fingerprint(digests: tuple[tuple[int, str], ...]) -> str:
    joined = "".join(digest for _, digest in sorted(digests))
    return hashlib.sha256(joined.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class TokenCounts:
    """Token counts of every sample of a probe; 0 for those that are not measured."""

    vision: list[int] | None  # None if there is only a tokenizer
    text: list[int]  # text tokens of an evaluation; with a tokenizer only, of the texts themselves
    fingerprint: str | None  # tokens_fingerprint of evaluations with this model and processor


def counts_of_model(probe: Probe, adapter: Adapter, text_only: str = LEAVE_OUT) -> TokenCounts:
    """Tokens of every sample in an evaluation, with an adapter that knows its masks before the forward."""
    encoded = encode_probe(probe, adapter, share=SampleShare(), batch_size=1, text_only=text_only)
    vision, text = [0] * len(probe), [0] * len(probe)
    places = measured_samples(probe.samples, text_only == COUNT)
    for (index, _), batch in zip(encoded.shard.samples, encoded.batches, strict=True):
        if batch.masks is not None:
            vision[places[index]] = int(batch.masks.vision.sum())
            text[places[index]] = int(batch.masks.text.sum())
    return TokenCounts(vision, text, encoded.tokens_fingerprint)


def counts_of_tokenizer(probe: Probe, tokenizer: Any) -> TokenCounts:
    """Tokens of the texts alone, each cut to max_text_tokens."""

    def count(text: str) -> int:
        return len(tokenizer(cut_text(tokenizer, text, probe.max_text_tokens), add_special_tokens=False)["input_ids"])

    return TokenCounts(None, [sum(map(count, sample.texts)) for sample in probe.samples], None)
