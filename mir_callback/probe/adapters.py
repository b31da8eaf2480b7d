# SPDX-License-Identifier: Apache-2.0
"""How samples become inputs of one family of models, and which adapter a model gets.

There is one here for transformers' own models and those built like them. Other families register a factory:
`llava_integration` does for LLaVA's code bases, anybody else with :func:`register_adapter` or an entry point of the
group "mir_callback.adapters".
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mir_callback.errors import ConfigError, ProbeError, UnsupportedModelError
from mir_callback.model.decoder import text_config, unwrap
from mir_callback.model.modality import ModalityMasks, modality_masks, vision_token_ids
from mir_callback.probe.probe import Sample

log = logging.getLogger(__name__)

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


# See :func:`register_adapter`.
AdapterFactory = Callable[..., Adapter | None]
ENTRY_POINTS = "mir_callback.adapters"
_registered: list[AdapterFactory] = []
_fallbacks: list[AdapterFactory] = []


def register_adapter(factory: AdapterFactory, *, fallback: bool = False) -> None:
    """Have a factory asked for the adapters of models from now on, before those registered earlier.

    Args:
        factory: called with the arguments of :func:`find_adapter`; returns an adapter, or None if the model is not of
            its family.
        fallback: ask it after those registered without this and after installed entry points.

    Ranks: every rank.
    """
    (_fallbacks if fallback else _registered).insert(0, factory)


def find_adapter(model: nn.Module, processor: Any, *, conversation: str | None = None, trainer: Any = None) -> Adapter:
    """The adapter of a model: the first that a factory makes, else that of transformers' models.

    Args:
        model: the model, bare or wrapped.
        processor: its processor, or what its family needs instead: a tokenizer, or None.
        conversation: name of a template of the family; None for the run's own.
        trainer: the Trainer, which may know how the run encodes its data.

    Raises:
        ConfigError: no model, a processor that cannot handle images, a template where there are none.
        UnsupportedModelError: nobody knows the model, or its family's adapter cannot take it.

    Ranks: each for itself.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch module, got {type(model).__name__}; pass trainer.model")
    kind, ours, missing = type(unwrap(model)), package_of(model) == "transformers", ""
    if not ours:
        try:
            importlib.import_module("llava_integration")  # registers its factories
        except ImportError as error:
            missing = f"; not llava_integration: {error}"
    factories = [*_registered, *_load_entry_points(), *_fallbacks]
    for factory in factories:
        adapter = factory(model, processor, conversation=conversation, trainer=trainer)
        if adapter is not None:
            return adapter
    if not ours and not _fits_transformers(unwrap(model), processor):
        asked = ", ".join(sorted({getattr(each, "__module__", repr(each)) for each in factories})) or "nobody"
        raise UnsupportedModelError(
            f"{kind.__module__}.{kind.__name__} is of no kind known here: not one of transformers' own models, and "
            f"no factory of adapters takes it (asked: {asked}{missing}); write an adapter "
            "(mir_callback.probe.adapters.Adapter) and pass adapter=..., or register its factory with register_adapter"
        )
    if conversation is not None:
        raise ConfigError(f"{kind.__name__} has no conversation templates, got {conversation!r}; leave it out")
    return HuggingFaceAdapter(model, processor)


def _fits_transformers(model: Any, processor: Any) -> bool:
    """Whether a model that somebody else has built looks like transformers' own; self-checks refuse what does not fit.

    Not one that splices images into its inputs by itself, as LLaVA's code bases do.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or hasattr(model, "prepare_inputs_labels_for_multimodal"):
        return False
    try:
        vision_token_ids(model)
        require_processor(processor)
    except (ConfigError, UnsupportedModelError):
        return False
    return True


def package_of(model: nn.Module) -> str:
    """The package whose forward a model runs: FSDP2 puts classes of its own, without one, before the model's."""
    kinds = type(unwrap(model)).__mro__
    return next(kind.__module__ for kind in kinds if "forward" in vars(kind)).partition(".")[0]


@cache
def _load_entry_points() -> tuple[AdapterFactory, ...]:
    found = []
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        try:
            found.append(entry.load())
        except Exception as error:  # somebody else's package, which is no reason to leave other models alone
            log.warning("the adapters of %s cannot be loaded: %s: %s", entry.value, type(error).__name__, error)
    return tuple(found)


class HuggingFaceAdapter:
    """Encodes samples through a transformers processor: the image, then the text, as in LLaVA's pre-training.

    Args:
        model: a vision-language model of transformers, bare or wrapped; only its configuration is read.
        processor: its processor, with `image_processor` and `tokenizer`.

    Raises:
        ConfigError: the processor cannot handle images and text, or names no image token.
        UnsupportedModelError: the configuration names no image token.
    """

    def __init__(self, model: nn.Module, processor: Any) -> None:
        top: Any = unwrap(model)
        self._longest = getattr(text_config(top), "max_position_embeddings", None)
        self._processor = processor
        self._tokenizer = require_processor(processor)
        self._vision_ids = vision_token_ids(top)
        self._placeholder = image_placeholder(processor, self._tokenizer, top.config)

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
        texts = [cut_text(self._tokenizer, sample.text, max_text_tokens) for sample in samples]
        for text, sample in zip(texts, samples, strict=True):
            require_plain_text(self._tokenizer, text, sample.name, self._vision_ids)
        prompts = [self._placeholder + text for text in texts]
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
        inputs = {name: value for name, value in encoded.items() if name not in ("labels", "label", "label_ids")}
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        return inputs

    def _check(self, samples: Sequence[Sample], inputs: Mapping[str, Any], masks: ModalityMasks) -> None:
        for modality, mask in (("vision", masks.vision), ("text", masks.text)):
            for sample, found in zip(samples, mask.any(dim=1).tolist(), strict=True):
                if not found:
                    raise ProbeError(
                        f"probe sample {sample.name} must give {modality} tokens, got none among {mask.shape[1]} "
                        "positions; check that the processor belongs to this model"
                    )
        longest = int(inputs["attention_mask"].sum(dim=1).max())
        if isinstance(self._longest, int) and longest > self._longest:
            raise ProbeError(
                f"max_text_tokens must keep samples within the model's {self._longest} positions, got a sample of "
                f"{longest} tokens; build the probe with a smaller max_text_tokens"
            )


def require_processor(processor: Any) -> Any:
    """The tokenizer of a processor; ConfigError if it cannot handle images and text."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise ConfigError(
            "processor must handle images and text (have image_processor and tokenizer), got "
            f"{type(processor).__name__}; pass processor=AutoProcessor.from_pretrained(...), or give the Trainer "
            "processing_class=processor"
        )
    return tokenizer


def image_placeholder(processor: Any, tokenizer: Any, config: Any) -> str:
    """What stands for one image in a prompt, as the processor expects it before it expands it.

    Qwen-VL's processors do not add the start and end tokens of an image themselves, so they get them around it.
    """
    token = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
    if token is None:
        raise ConfigError(
            f"processor {type(processor).__name__} must name its image token (image_token), got none; "
            "this family needs an adapter"
        )
    start, end = getattr(config, "vision_start_token_id", None), getattr(config, "vision_end_token_id", None)
    if start is None or end is None:
        return str(token)
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
    """Refuse a text in which the tokenizer reads a control token or one of these; an unknown character is none."""
    control = {*more_control_ids, *getattr(tokenizer, "all_special_ids", ())}
    unknown = getattr(tokenizer, "unk_token_id", None)
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if token in control and token != unknown:
            raise ProbeError(
                f"probe text of {sample} must be plain text, got the control token "
                f"{tokenizer.convert_ids_to_tokens(token)!r} in it; remove or rewrite it"
            )
