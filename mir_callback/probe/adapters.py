# SPDX-License-Identifier: Apache-2.0
"""Hugging Face vision-language models: inputs from the model's own processor, masks from the token ids.

The prompt is the plain one of LLaVA's pre-training: the image, then the text, no roles and no template.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mir_callback.errors import ConfigError, ProbeError
from mir_callback.model.decoder import unwrap
from mir_callback.model.modality import ModalityMasks, modality_masks, vision_token_ids
from mir_callback.probe.probe import Sample

# Called at the first decoder layer of a forward: the masks of the sequence that the layers see in it.
LiveMasks = Callable[[], ModalityMasks]


@dataclass(frozen=True)
class AdaptedBatch:
    """Samples as inputs of a model, on the CPU.

    Attributes:
        inputs: keyword arguments of the model's forward, without labels.
        masks: modality masks (B, S), or None if only the forward itself shows where image features end up.
        token_ids: the real token ids of each sample, (n,) integers; what makes encodings comparable.
        text_ids: those of them after the last image, for the loss on the probe's texts; None if that is not offered.
    """

    inputs: dict[str, Any]
    masks: ModalityMasks | None
    token_ids: list[Tensor]
    text_ids: list[Tensor] | None = None


@runtime_checkable
class Adapter(Protocol):
    """Between a probe and one family of models. Stateless between calls; the same on every rank."""

    def encode(self, samples: Sequence[Sample], max_text_tokens: int) -> AdaptedBatch:
        """Turn samples into one batch, image first, text after, cut to ``max_text_tokens``.

        Raises:
            ProbeError: a sample does not fit the model; the message names it.
        """
        ...

    def live_masks(self, model: nn.Module) -> AbstractContextManager[LiveMasks | None]:
        """While open, observe where the model puts image features; None if `encode` knows already.

        Must leave the model as it was.
        """
        ...


_LABELS = ("labels", "label", "label_ids")


class HuggingFaceAdapter:
    """Encodes samples through a transformers processor.

    Args:
        model: a vision-language model of transformers, bare or wrapped; only its configuration is read.
        processor: its processor, with `image_processor` and `tokenizer`.

    Raises:
        ConfigError: the processor cannot handle images and text.
        UnsupportedModelError: the configuration names no image token.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        top: Any = unwrap(model)
        self._config = top.config
        self._processor = processor
        self._tokenizer = require_processor(processor)
        self._vision_ids = vision_token_ids(top)
        self._placeholder = image_placeholder(processor, self._tokenizer, self._config)

    def encode(self, samples: Sequence[Sample], max_text_tokens: int) -> AdaptedBatch:
        """See :class:`Adapter`."""
        if len(samples) > 1 and getattr(self._tokenizer, "pad_token_id", None) is None:
            raise ConfigError(
                "processor.tokenizer must have a pad token to batch samples, got none; "
                "set tokenizer.pad_token or use batch_size=1"
            )
        inputs = self._process(samples, max_text_tokens)
        masks = modality_masks(inputs["input_ids"], inputs["attention_mask"], self._vision_ids)
        self._check(samples, inputs, masks)
        real = [ids[mask != 0] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        texts = [ids[mask] for ids, mask in zip(inputs["input_ids"], masks.text, strict=True)]
        return AdaptedBatch(inputs, masks, real, texts)

    def live_masks(self, model: nn.Module) -> AbstractContextManager[LiveMasks | None]:
        """Image features stand where their ids stand; nothing to observe."""
        return nullcontext()

    def _process(self, samples: Sequence[Sample], max_text_tokens: int) -> dict[str, Any]:
        prompts = [self._placeholder + self._text_of(sample, max_text_tokens) for sample in samples]
        images = [[sample.open_image()] for sample in samples]
        try:
            encoded: Mapping[str, Any] = self._processor(
                images=images, text=prompts, padding=len(samples) > 1, return_tensors="pt"
            )
        except Exception as error:
            names = ", ".join(sample.name for sample in samples)
            raise ProbeError(
                f"probe samples must pass the model's processor {type(self._processor).__name__}, got "
                f"{type(error).__name__}: {error}; the samples were {names}"
            ) from error
        inputs = {name: value for name, value in encoded.items() if name not in _LABELS}
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        return inputs

    def _text_of(self, sample: Sample, max_text_tokens: int) -> str:
        text = cut_text(self._tokenizer, sample.text, max_text_tokens)
        require_plain_text(self._tokenizer, text, sample.name, self._vision_ids)
        return text

    def _check(self, samples: Sequence[Sample], inputs: Mapping[str, Any], masks: ModalityMasks) -> None:
        for row, sample in enumerate(samples):
            counts = {"vision": int(masks.vision[row].sum()), "text": int(masks.text[row].sum())}
            for modality, count in counts.items():
                if count == 0:
                    raise ProbeError(
                        f"probe sample {sample.name} must give {modality} tokens, got none among "
                        f"{inputs['input_ids'].shape[1]} positions; check that the processor belongs to this model"
                    )
        longest = int(inputs["attention_mask"].sum(dim=1).max())
        config = self._config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        limit = getattr(text, "max_position_embeddings", None)
        if isinstance(limit, int) and longest > limit:
            raise ProbeError(
                f"max_text_tokens must keep samples within the model's {limit} positions, got a sample of {longest} "
                "tokens; build the probe with a smaller max_text_tokens"
            )


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


def require_plain_text(tokenizer: Any, text: str, sample: str, more_control_ids: Iterable[int] = ()) -> None:
    """Refuse a text that the tokenizer reads control tokens in; an unknown character is none.

    Args:
        tokenizer: the run's.
        text: a probe text.
        sample: its sample's name, for the message.
        more_control_ids: ids to refuse besides the tokenizer's special ones.

    Raises:
        ProbeError: there is one.
    """
    control = {*more_control_ids, *getattr(tokenizer, "all_special_ids", ())}
    unknown = getattr(tokenizer, "unk_token_id", None)
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if token in control and token != unknown:
            raise ProbeError(
                f"probe text of {sample} must be plain text, got the control token "
                f"{tokenizer.convert_ids_to_tokens(token)!r} in it; remove or rewrite it"
            )
