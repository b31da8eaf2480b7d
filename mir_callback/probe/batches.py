# SPDX-License-Identifier: Apache-2.0
"""How many tokens the samples of a probe become, without a forward."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mir_callback.errors import ConfigError
from mir_callback.model.modality import ModalityMasks
from mir_callback.probe.adapters import Adapter, cut_text
from mir_callback.probe.probe import Probe, Sample

# A changed setting of the image processor shows in any image, so a few of them, encoded one by one, will do.
_PIXEL_SAMPLES = 4


@dataclass(frozen=True)
class ProbeBatch:
    """One forward's worth of samples, on the CPU.

    Attributes:
        inputs: keyword arguments of the model's forward.
        masks: modality masks (B, S), or None if only the forward shows them.
        keep: (B,) bool, False for repeats that only fill up the batch count of a rank.
        text_ids: token ids of each sample's text, or None if the adapter does not tell.
    """

    inputs: dict[str, Any]
    masks: ModalityMasks | None
    keep: Tensor
    text_ids: list[Tensor] | None = None

    def on(self, device: torch.device, dtype: torch.dtype | None) -> ProbeBatch:
        """The batch on ``device``, floating inputs in ``dtype`` if one is given."""

        def moved(value: Any) -> Any:
            if isinstance(value, list):
                return [moved(item) for item in value]
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype=dtype if value.is_floating_point() else None)

        masks = self.masks
        return ProbeBatch(
            inputs={name: moved(value) for name, value in self.inputs.items()},
            masks=None if masks is None else ModalityMasks(masks.vision.to(device), masks.text.to(device)),
            keep=self.keep.to(device),
            text_ids=self.text_ids,
        )


@dataclass
class Share:
    """The part of a probe that one rank forwards: what it is, and what forwards have shown of it so far.

    The only thing here that changes: batches that memory does not suffice for are cut anew, once for all later
    evaluations, and what a first evaluation learns helps to plan the next.

    Attributes:
        probe: all samples.
        rank: whose share.
        world_size: number of ranks.
        batch_size: samples of a batch.
        batches: equally many on every rank.
        rows: vision and text rows a layer gets from it, or None as long as only a forward can tell.
        dtype: of the hidden states, once seen.
        pinned: bytes of pinned host memory that torch holds since an earlier evaluation.
    """

    probe: Probe
    rank: int
    world_size: int
    batch_size: int
    batches: list[ProbeBatch] = field(default_factory=list)
    rows: tuple[int, int] | None = None
    dtype: torch.dtype | None = None
    pinned: int = 0

    @property
    def samples(self) -> list[tuple[int, bool]]:
        """(sample index, keep), see :func:`share_of_rank`."""
        return share_of_rank(len(self.probe), self.rank, self.world_size)

    @property
    def rows_are_exact(self) -> bool:
        """Whether the rows are known without a forward."""
        return all(batch.masks is not None for batch in self.batches)

    def cut(self, adapter: Adapter, batch_size: int) -> list[Tensor]:
        """Encode the share anew in batches of ``batch_size``.

        Encoded and not sliced: what of a batch's inputs belongs to which sample, only its processor knows.

        Returns:
            The real token ids of each of its samples, repeats included.

        Raises:
            ConfigError, ProbeError: as :func:`encode_probe`.

        Ranks: each for itself; every rank must do it.
        """
        batches, token_ids = [], []
        samples = self.samples
        for start in range(0, len(samples), batch_size):
            part = samples[start : start + batch_size]
            adapted = adapter.encode([self.probe.samples[index] for index, _ in part], self.probe.max_text_tokens)
            keeps = torch.tensor([keep for _, keep in part])
            batches.append(ProbeBatch(adapted.inputs, adapted.masks, keeps, adapted.text_ids))
            token_ids += adapted.token_ids
        self.batches, self.batch_size = batches, batch_size
        if self.rows_are_exact:
            self.rows = _rows_of(batches)
        return token_ids


@dataclass(frozen=True)
class EncodedProbe:
    """This rank's share of a probe, encoded for one model and processor.

    Attributes:
        share: the batches, equally many on every rank.
        num_samples: samples of the whole probe.
        fingerprint: the probe's.
        digests: (sample index, digest of its token ids), in the end of all samples of the probe.
        pixel_digests: (sample index, digest of its floating inputs), in the end of the first samples of the probe.
        ranks_here: ranks on this machine, who share its memory.
        capture_budget_gb: GB of rows a rank may keep on its device, or None for a share of what is free.
    """

    share: Share
    num_samples: int
    fingerprint: str
    digests: tuple[tuple[int, str], ...]
    pixel_digests: tuple[tuple[int, str], ...]
    ranks_here: int = 1
    capture_budget_gb: float | None = None

    @property
    def batches(self) -> list[ProbeBatch]:
        """This rank's batches, as they are cut now."""
        return self.share.batches

    @property
    def tokens_fingerprint(self) -> str:
        """16 hexadecimal digits over the token ids of the samples in ``digests``."""
        return _fingerprint(self.digests)

    @property
    def pixels_fingerprint(self) -> str:
        """16 hexadecimal digits over the floating inputs of the samples in ``pixel_digests``.

        Changes with the settings of the image processor, and possibly in the last bit with the version of an image
        library: a reason to look, not to refuse.
        """
        return _fingerprint(self.pixel_digests)


def check_batch_size(batch_size: int) -> None:
    """Raise ConfigError unless ``batch_size`` is a positive whole number of samples. Ranks: pure."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size must be an integer of at least 1 sample, got {batch_size!r}; use e.g. 4")


def share_of_rank(num_samples: int, rank: int, world_size: int) -> list[tuple[int, bool]]:
    """Which samples a rank encodes: (sample index, keep), equally many on every rank.

    Sample i belongs to rank i mod W. Ranks that come out short repeat a sample with keep False.

    Ranks: pure.
    """
    length = -(-num_samples // world_size)
    mine = list(range(rank, num_samples, world_size))
    return [(index, True) for index in mine] + [(0, False)] * (length - len(mine))


def encode_probe(probe: Probe, adapter: Adapter, *, rank: int, world_size: int, batch_size: int) -> EncodedProbe:
    """Encode this rank's share of a probe.

    Args:
        probe: the samples.
        adapter: of the model's family.
        rank: this rank.
        world_size: number of ranks.
        batch_size: samples per forward; equal on every rank.

    Returns:
        The encoded share.

    Raises:
        ConfigError: batch_size is not a positive integer, or the processor cannot batch.
        ProbeError: a sample does not fit the model.

    Ranks: each for itself; the number of batches is the same everywhere.
    """
    check_batch_size(batch_size)
    share = Share(probe, rank, world_size, batch_size)
    token_ids = share.cut(adapter, batch_size)
    samples = share.samples
    digests = [(index, _digest(ids)) for (index, keep), ids in zip(samples, token_ids, strict=True) if keep]
    pixel_digests = []
    for index, keep in samples:
        if keep and index < _PIXEL_SAMPLES:
            pixel_digests.append((index, _pixel_digest(adapter, probe.samples[index], probe.max_text_tokens)))
    return EncodedProbe(share, len(probe), probe.fingerprint, tuple(digests), tuple(pixel_digests))


def _rows_of(batches: list[ProbeBatch]) -> tuple[int, int]:
    """Vision and text rows of the kept samples, from masks that are known."""
    vision = text = 0
    for batch in batches:
        if batch.masks is not None:
            vision += int(batch.masks.vision[batch.keep].sum())
            text += int(batch.masks.text[batch.keep].sum())
    return vision, text


def _digest(token_ids: Tensor) -> str:
    """Digest of one sample's real token ids; equal whatever batch, padding side or rank it was encoded in."""
    return hashlib.sha256(token_ids.to(torch.int64).contiguous().numpy().tobytes()).hexdigest()


def _pixel_digest(adapter: Adapter, sample: Sample, max_text_tokens: int) -> str:
    """Digest of one sample's floating inputs: encoded alone, so that no neighbour's size or padding is in it."""
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
    """Tokens of every sample.

    Attributes:
        vision: per sample, or None where only a forward shows them or no model was named.
        text: per sample, those after the image; of a tokenizer alone those of the text itself.
        fingerprint: the tokens fingerprint that evaluations with this model and processor carry, or None.
    """

    vision: list[int] | None
    text: list[int]
    fingerprint: str | None


def counts_of_model(probe: Probe, adapter: Adapter) -> TokenCounts:
    """Tokens as an evaluation with this adapter has them.

    Args:
        probe: the samples.
        adapter: one that knows its masks before the forward, as that of Hugging Face models does.

    Raises:
        ProbeError: a sample does not fit the model; the message names it.

    Ranks: any, each for itself.
    """
    encoded = encode_probe(probe, adapter, rank=0, world_size=1, batch_size=1)
    masks = [batch.masks for batch in encoded.batches]
    vision = [int(mask.vision.sum()) for mask in masks if mask is not None]
    text = [int(mask.text.sum()) for mask in masks if mask is not None]
    return TokenCounts(vision, text, encoded.tokens_fingerprint)


def counts_of_tokenizer(probe: Probe, tokenizer: Any) -> TokenCounts:
    """Tokens of the texts alone, after the probe's cut. Ranks: any, each for itself."""
    texts = (cut_text(tokenizer, sample.text, probe.max_text_tokens) for sample in probe.samples)
    return TokenCounts(None, [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts], None)
