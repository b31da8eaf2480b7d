# SPDX-License-Identifier: Apache-2.0
"""Every rank's share of a probe as batches of model inputs, equally many on every rank."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mir_callback.errors import ConfigError
from mir_callback.model.modality import ModalityMasks
from mir_callback.probe.adapter import Adapter
from mir_callback.probe.samples import Probe, Sample

# A changed setting of the image processor shows in any image, so a few of them, encoded one by one, will do.
_PIXEL_SAMPLES = 4


@dataclass(frozen=True)
class ProbeBatch:
    """One forward's worth of samples, on the CPU.

    Attributes:
        inputs: keyword arguments of the model's forward.
        masks: modality masks (B, S), or None if only the forward shows them.
        keep: (B,) bool, False for repeats that only fill up the batch count of a rank.
    """

    inputs: dict[str, Any]
    masks: ModalityMasks | None
    keep: Tensor

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
        )


@dataclass(frozen=True)
class EncodedProbe:
    """This rank's share of a probe, encoded for one model and processor.

    Attributes:
        batches: equally many on every rank.
        num_samples: samples of the whole probe.
        fingerprint: the probe's.
        digests: (sample index, digest of its token ids), in the end of all samples of the probe.
        pixel_digests: (sample index, digest of its floating inputs), in the end of the first samples of the probe.
    """

    batches: list[ProbeBatch]
    num_samples: int
    fingerprint: str
    digests: tuple[tuple[int, str], ...]
    pixel_digests: tuple[tuple[int, str], ...]

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
    share = share_of_rank(len(probe), rank, world_size)
    batches, digests, pixel_digests = [], [], []
    for start in range(0, len(share), batch_size):
        part = share[start : start + batch_size]
        adapted = adapter.encode([probe.samples[index] for index, _ in part], probe.max_text_tokens)
        batches.append(ProbeBatch(adapted.inputs, adapted.masks, torch.tensor([keep for _, keep in part])))
        digests += [(index, _digest(ids)) for (index, keep), ids in zip(part, adapted.token_ids, strict=True) if keep]
    for index, keep in share:
        if keep and index < _PIXEL_SAMPLES:
            pixel_digests.append((index, _pixel_digest(adapter, probe.samples[index], probe.max_text_tokens)))
    return EncodedProbe(batches, len(probe), probe.fingerprint, tuple(digests), tuple(pixel_digests))


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
