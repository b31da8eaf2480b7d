# SPDX-License-Identifier: Apache-2.0
"""Samples to model inputs: every rank's share of a probe as batches, equally many on every rank.

The prompt is the plain one of LLaVA's pre-training: the image, then the text, no roles and no template.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mir_callback.errors import ConfigError, ProbeError
from mir_callback.model.modality import ModalityMasks, modality_masks
from mir_callback.probe.samples import Probe, Sample

_LABELS = ("labels", "label", "label_ids")


@dataclass(frozen=True)
class ProbeBatch:
    """One forward's worth of samples, on the CPU.

    Attributes:
        inputs: keyword arguments of the model's forward.
        masks: modality masks (B, S).
        keep: (B,) bool, False for repeats that only fill up the batch count of a rank.
    """

    inputs: dict[str, Any]
    masks: ModalityMasks
    keep: Tensor

    def on(self, device: torch.device, dtype: torch.dtype | None) -> ProbeBatch:
        """The batch on ``device``, floating inputs in ``dtype`` if one is given."""

        def moved(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device, dtype=dtype if value.is_floating_point() else None)

        return ProbeBatch(
            inputs={name: moved(value) for name, value in self.inputs.items()},
            masks=ModalityMasks(self.masks.vision.to(device), self.masks.text.to(device)),
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
    """

    batches: list[ProbeBatch]
    num_samples: int
    fingerprint: str
    digests: tuple[tuple[int, str], ...]

    @property
    def tokens_fingerprint(self) -> str:
        """16 hexadecimal digits over the token ids of the samples in ``digests``."""
        joined = "".join(digest for _, digest in sorted(self.digests))
        return hashlib.sha256(joined.encode()).hexdigest()[:16]


def share_of_rank(num_samples: int, rank: int, world_size: int) -> list[tuple[int, bool]]:
    """Which samples a rank encodes: (sample index, keep), equally many on every rank.

    Sample i belongs to rank i mod W. Ranks that come out short repeat a sample with keep False.

    Ranks: pure.
    """
    length = -(-num_samples // world_size)
    mine = list(range(rank, num_samples, world_size))
    return [(index, True) for index in mine] + [(0, False)] * (length - len(mine))


def encode_probe(
    probe: Probe,
    processor: Any,
    vision_ids: tuple[int, ...],
    config: Any,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
) -> EncodedProbe:
    """Encode this rank's share of a probe through the model's own processor.

    Args:
        probe: the samples.
        processor: a transformers processor with `image_processor` and `tokenizer`.
        vision_ids: ids of image features in `input_ids`.
        config: the model's configuration, for its special tokens and longest sequence.
        rank: this rank.
        world_size: number of ranks.
        batch_size: samples per forward; equal on every rank.

    Returns:
        The encoded share.

    Raises:
        ConfigError: batch_size is not a positive integer, or the processor cannot handle images.
        ProbeError: a sample whose encoding has no vision or no text tokens, or is too long for the model.

    Ranks: each for itself; the number of batches is the same everywhere.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    tokenizer = require_processor(processor)
    if batch_size > 1 and getattr(tokenizer, "pad_token_id", None) is None:
        raise ConfigError(
            "processor.tokenizer must have a pad token to batch samples, got none; "
            "set tokenizer.pad_token or use batch_size=1"
        )
    placeholder = image_placeholder(processor, tokenizer, config)
    share = share_of_rank(len(probe), rank, world_size)
    batches, digests = [], []
    for start in range(0, len(share), batch_size):
        part = share[start : start + batch_size]
        samples = [probe.samples[index] for index, _ in part]
        inputs = _encode(samples, processor, tokenizer, placeholder, probe.max_text_tokens)
        masks = modality_masks(inputs["input_ids"], inputs["attention_mask"], vision_ids)
        _check_batch(samples, inputs, masks, config)
        batches.append(ProbeBatch(inputs, masks, torch.tensor([keep for _, keep in part])))
        digests += [(index, _digest(inputs, row)) for row, (index, keep) in enumerate(part) if keep]
    return EncodedProbe(batches, len(probe), probe.fingerprint, tuple(digests))


def require_processor(processor: Any) -> Any:
    """The tokenizer of a processor that handles images and text.

    Raises:
        ConfigError: it is None, a bare tokenizer, or otherwise lacks one of the two.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise ConfigError(
            "processor must handle images and text (have image_processor and tokenizer), "
            f"got {type(processor).__name__}; pass processor=AutoProcessor.from_pretrained(...), to MIRCallback or "
            "evaluate_mir, or give the Trainer processing_class=processor"
        )
    return tokenizer


def image_placeholder(processor: Any, tokenizer: Any, config: Any) -> str:
    """What stands for one image in a prompt, as the processor expects it before it expands it.

    Families whose configuration names start and end tokens of an image but whose processor does not add them itself
    (Qwen-VL) get them around it.

    Raises:
        ConfigError: the processor names no image token.
    """
    token = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
    if token is None:
        raise ConfigError(
            f"processor {type(processor).__name__} must name its image token (image_token), got none; "
            "this family needs an adapter"
        )
    token = str(token)
    start, end = getattr(config, "vision_start_token_id", None), getattr(config, "vision_end_token_id", None)
    if start is None or end is None:
        return token
    before, after = tokenizer.convert_ids_to_tokens([start, end])
    return f"{before}{token}{after}"


def cut_text(tokenizer: Any, text: str, max_tokens: int) -> str:
    """The beginning of a text, at most ``max_tokens`` tokens long."""
    if not getattr(tokenizer, "is_fast", False):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return text if len(ids) <= max_tokens else str(tokenizer.decode(ids[:max_tokens]))
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(offsets) <= max_tokens else text[: offsets[max_tokens - 1][1]]


def _encode(
    samples: list[Sample], processor: Any, tokenizer: Any, placeholder: str, max_text_tokens: int
) -> dict[str, Any]:
    prompts = [placeholder + cut_text(tokenizer, sample.text, max_text_tokens) for sample in samples]
    images = [[sample.open_image()] for sample in samples]
    try:
        encoded: Mapping[str, Any] = processor(
            images=images, text=prompts, padding=len(samples) > 1, return_tensors="pt"
        )
    except Exception as error:
        names = ", ".join(sample.name for sample in samples)
        raise ProbeError(
            f"probe samples must pass the model's processor {type(processor).__name__}, got "
            f"{type(error).__name__}: {error}; the samples were {names}"
        ) from error
    inputs = {name: value for name, value in encoded.items() if name not in _LABELS}
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    return inputs


def _check_batch(samples: list[Sample], inputs: Mapping[str, Any], masks: ModalityMasks, config: Any) -> None:
    for row, sample in enumerate(samples):
        counts = {"vision": int(masks.vision[row].sum()), "text": int(masks.text[row].sum())}
        for modality, count in counts.items():
            if count == 0:
                raise ProbeError(
                    f"probe sample {sample.name} must give {modality} tokens, got none among "
                    f"{inputs['input_ids'].shape[1]} positions; check that the processor belongs to this model"
                )
    longest = int(inputs["attention_mask"].sum(dim=1).max())
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    if isinstance(limit, int) and longest > limit:
        raise ProbeError(
            f"max_text_tokens must keep samples within the model's {limit} positions, got a sample of {longest} "
            "tokens; build the probe with a smaller max_text_tokens"
        )


def _digest(inputs: Mapping[str, Any], row: int) -> str:
    """Digest of one sample's real token ids; equal whatever batch, padding side or rank it was encoded in."""
    real = inputs["attention_mask"][row] != 0
    ids = inputs["input_ids"][row][real].to(torch.int64)
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()
