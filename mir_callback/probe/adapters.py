# SPDX-License-Identifier: Apache-2.0
"""Adapters: how probe samples become inputs of a family of models, and which adapter a model gets.

The one here is for transformers' own models and those built like them. Other families register a factory:
`llava_integration` does so for LLaVA's code bases, a third party calls :func:`register_adapter` or declares an entry
point in the group "mir_callback.adapters".
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mir_callback.errors import ConfigError, ProbeError, UnsupportedModelError
from mir_callback.model.decoder import Decoder, find_decoder, text_config, unwrap
from mir_callback.model.modality import ModalityMasks, modality_masks, vision_token_ids
from mir_callback.model.parallelism import refuse_unmeasurable
from mir_callback.probe.probe import Sample
from mir_callback.probe.processors import REMEDY, handles_images, kept_by, load_processor, search_processor
from mir_callback.probe.prompt import (
    CHAT,
    EXAMPLE,
    PLAIN,
    PLAIN_FORMAT,
    TEXT,
    as_format,
    before_image,
    check_prompt,
    is_format,
    require_no_image_token,
    require_single_ends,
)

log = logging.getLogger(__name__)

# Called when a forward reaches the first decoder layer; returns the masks of the sequence that the layers get.
LiveMasks = Callable[[], ModalityMasks]


@dataclass(frozen=True)
class AdaptedBatch:
    """B samples as inputs of a model, on the CPU.

    Attributes:
        inputs: keyword arguments of the model's forward, without labels; floating tensors are cast to its dtype.
        masks: vision and text positions, each (B, S) bool; None if only the forward itself knows where image features
            go (see :meth:`Adapter.live_masks`).
        token_ids: for each sample its token ids without padding, (n,) integers; they are fingerprinted, so that a
            changed tokenizer or template is noticed.
        text_ids: for each sample the token ids after its image, (t,) integers, which ``probe_loss`` predicts; None if
            the adapter does not support that option.
    """

    inputs: dict[str, Any]
    masks: ModalityMasks | None
    token_ids: list[Tensor]
    text_ids: list[Tensor] | None = None


@runtime_checkable
class Adapter(Protocol):
    """What a family of models needs so that MIR can be measured on it.

    An adapter keeps no state between calls and is the same on every rank. Pass one as ``adapter=``, or register a
    factory with :func:`register_adapter`. If it has an attribute ``prompt``, what it puts around image and text as a
    format string, that goes into each record.

    Example::

        class MyAdapter:
            def __init__(self, tokenizer, image_processor, image_token_id):
                self.tokenizer, self.image_processor, self.image_token_id = tokenizer, image_processor, image_token_id

            def encode(self, samples, max_text_tokens):
                texts = [cut_text(self.tokenizer, sample.text, max_text_tokens) for sample in samples]
                batch = self.tokenizer(["<image>" + text for text in texts], padding=True, return_tensors="pt")
                pixels = self.image_processor([sample.open_image() for sample in samples], return_tensors="pt")
                ids, mask = batch["input_ids"], batch["attention_mask"]
                masks = modality_masks(ids, mask, (self.image_token_id,))
                real = [row[keep != 0] for row, keep in zip(ids, mask)]
                return AdaptedBatch({**batch, **pixels}, masks, real)

            def live_masks(self, model):
                return nullcontext()  # the masks are known before the forward
    """

    def encode(self, samples: Sequence[Sample], max_text_tokens: int) -> AdaptedBatch:
        """Turn samples into one batch: of each its image, then its text, cut to ``max_text_tokens`` tokens.

        What a prompt has around them is not cut.

        Args:
            samples: B samples, at least 1.
            max_text_tokens: longer texts are cut, see :func:`cut_text`.

        Returns:
            The batch, on the CPU.

        Raises:
            ProbeError: a sample does not fit the model; the message names it (``sample.name``).

        Ranks: any. Ranks encode different samples, equally many batches each.
        """
        ...

    def live_masks(self, model: nn.Module) -> AbstractContextManager[LiveMasks | None]:
        """A context manager around all forwards of an evaluation, for models that place image features themselves.

        Args:
            model: the unwrapped model. On exit it must be as it was.

        Returns:
            A context manager that yields a function, which is called when a forward reaches the first decoder layer
            and returns the masks (B, S) of that forward; or that yields None if :meth:`encode` returned the masks.

        Ranks: every rank enters it.
        """
        ...


@runtime_checkable
class NamesDecoder(Protocol):
    """An adapter for models without a transformers configuration, in which :func:`find_decoder` finds nothing."""

    def decoder(self, model: nn.Module) -> Decoder:
        """The decoder layers of an unwrapped model: :func:`mir_callback.model.decoder.decoder_at`. Ranks: any."""
        ...


def decoder_of(model: nn.Module, adapter: Adapter) -> Decoder:
    """The decoder of a model: the one that its adapter names, else as :func:`find_decoder` finds it. Ranks: pure."""
    return adapter.decoder(unwrap(model)) if isinstance(adapter, NamesDecoder) else find_decoder(model)


# See :func:`register_adapter`.
AdapterFactory = Callable[..., Adapter | None]
ENTRY_POINTS = "mir_callback.adapters"
_registered: list[AdapterFactory] = []
_fallbacks: list[AdapterFactory] = []


def register_adapter(factory: AdapterFactory, *, fallback: bool = False) -> None:
    """Register a factory of adapters for a family of models. The last one registered is asked first.

    Args:
        factory: called as ``factory(model, processor, prompt=..., trainer=...)``, see :func:`find_adapter`;
            returns an :class:`Adapter`, or None for a model that is not of its family.
        fallback: ask it only after those registered without this, and after installed entry points.

    Ranks: call it on every rank.

    Example::

        def make_adapter(model, processor, *, prompt=None, trainer=None):
            if type(unwrap(model)).__name__ != "MyVLM":
                return None
            if prompt is not None:
                raise ConfigError(f"prompt={prompt!r}: MyVLM has only its own. Leave it out.")
            return MyAdapter(processor.tokenizer, processor.image_processor, model.config.image_token_id)

        register_adapter(make_adapter)
    """
    (_fallbacks if fallback else _registered).insert(0, factory)


def find_adapter(
    model: nn.Module,
    processor: Any,
    *,
    adapter: Adapter | None = None,
    prompt: str | None = None,
    trainer: Any = None,
    keeper: Any = None,
) -> Adapter:
    """The adapter of a model: from the first factory that knows the model, else the one for transformers' models.

    Args:
        model: the model, bare or wrapped.
        processor: its processor, or a folder or name to load it from, or what its family needs instead (a tokenizer);
            None to look for it, see :func:`mir_callback.probe.processors.search_processor`.
        adapter: the user's own, which is returned as it is.
        prompt: what to put around image and text, see :class:`mir_callback.config.MIRConfig`; None for the family's
            default.
        trainer: the Trainer, from which a factory may read how the run encodes its data.
        keeper: where to look for the processor, if not in the Trainer.

    Raises:
        ConfigError: not a model, a processor that cannot handle images, a prompt that the family does not have,
            or a prompt beside an adapter.
        UnsupportedModelError: no factory knows the model, it has no vision tokens, its family's adapter refuses it, or
            it is spread over ranks in a way that can't be measured.

    Ranks: any; no communication.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model must be a torch module, got {type(model).__name__}. Pass e.g. trainer.model.")
    check_prompt(prompt)
    refuse_unmeasurable(model)
    if adapter is not None:
        if prompt is not None:
            raise ConfigError(
                f"prompt={prompt!r} beside adapter={type(adapter).__name__}, which has its own. Pass it to the adapter."
            )
        return adapter
    kind, ours, missing = type(unwrap(model)), package_of(model) == "transformers", ""
    if not ours:
        try:
            importlib.import_module("llava_integration")  # registers its factories
        except ImportError as error:
            missing = f"; llava_integration could not be imported: {error}"
    if isinstance(processor, (str, os.PathLike)):
        processor = load_processor(processor)
    keeper = trainer if keeper is None else keeper
    kept = kept_by(keeper) if processor is None else processor
    factories = [*_registered, *_load_entry_points(), *_fallbacks]
    for factory in factories:
        found = factory(model, kept, prompt=prompt, trainer=trainer)
        if found is not None:
            return found
    if not ours and not _fits_transformers(unwrap(model), processor, keeper):
        asked = ", ".join(sorted({getattr(each, "__module__", repr(each)) for each in factories})) or "none"
        raise UnsupportedModelError(
            f"There is no adapter for {kind.__module__}.{kind.__name__}: it is not one of transformers' models, and no "
            f"registered factory knows it (asked: {asked}{missing}). Write an adapter "
            "(mir_callback.probe.adapters.Adapter) and pass adapter=..., or register a factory with register_adapter."
        )
    vision_token_ids(unwrap(model))  # first: a text-only model has no processor that could be missing
    processor = search_processor(model, keeper) if processor is None else processor
    return HuggingFaceAdapter(model, processor, prompt=prompt)


def _fits_transformers(model: Any, processor: Any, keeper: Any) -> bool:
    """Whether a third party's model is built like transformers' own, so that the adapter for those will do.

    Models that place image features in their inputs themselves, as LLaVA's code bases do, are not.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or hasattr(model, "prepare_inputs_labels_for_multimodal"):
        return False
    try:
        vision_token_ids(model)
        require_processor(search_processor(model, keeper) if processor is None else processor)
    except (ConfigError, UnsupportedModelError):
        return False
    return True


def package_of(model: nn.Module) -> str:
    """The package that defines a model's forward; not the class's own, which may be FSDP2's and have no forward."""
    kinds = type(unwrap(model)).__mro__
    return next(kind.__module__ for kind in kinds if "forward" in vars(kind)).partition(".")[0]


@cache
def _load_entry_points() -> tuple[AdapterFactory, ...]:
    found = []
    for entry in metadata.entry_points(group=ENTRY_POINTS):
        try:
            found.append(entry.load())
        except Exception as error:  # a broken third-party package must not break other models
            log.warning("Could not load the adapters of %s: %s: %s", entry.value, type(error).__name__, error)
    return tuple(found)


# Families in which text after the image attends to later text, so that no loss of it is a prediction.
_SEE_AHEAD = ("paligemma",)


class HuggingFaceAdapter:
    """Encodes samples with a transformers processor: the image, then the text, and a prompt around them if asked.

    Args:
        model: a vision-language model of transformers, bare or wrapped; only its configuration is read.
        processor: its processor, with `image_processor` and `tokenizer`.
        prompt: "plain" (None) is image, then text, as in LLaVA's pre-training; "chat" the processor's chat template
            with the image as the user's turn and the text as the assistant's, as MIR's authors do; else a format string
            with {image} and {text}. It goes to the processor, which adds its special tokens as it does in any call.

    Attributes:
        prompt: the prompt as a format string.

    Raises:
        UnsupportedModelError: the model's configuration names no image token, so the model has no vision tokens.
        ConfigError: the processor does not handle both images and text, names no image token, or has no chat template
            that places an image and then a text; or the prompt is none of these.

    Example::

        adapter = HuggingFaceAdapter(model, AutoProcessor.from_pretrained("llava-hf/llava-1.5-7b-hf"))
        batch = adapter.encode(probe.samples[:4], probe.max_text_tokens)
        batch.masks.vision.sum(dim=1)  # vision tokens of each sample
    """

    def __init__(self, model: nn.Module, processor: Any, *, prompt: str | None = None) -> None:
        check_prompt(prompt)
        top: Any = unwrap(model)
        self._sees_ahead = getattr(top.config, "model_type", None) in _SEE_AHEAD
        self._max_positions = getattr(text_config(top), "max_position_embeddings", None)
        self._vision_ids = vision_token_ids(top)  # first: a text-only model has no processor that could be missing
        self._processor = processor
        self._tokenizer = require_processor(processor)
        self._placeholder = image_placeholder(processor, self._tokenizer, top.config)
        self._is_chat = prompt == CHAT
        self.prompt = self._find_format(prompt, type(top).__name__)

    def encode(self, samples: Sequence[Sample], max_text_tokens: int) -> AdaptedBatch:
        """See :class:`Adapter`."""
        if len(samples) > 1 and getattr(self._tokenizer, "pad_token_id", None) is None:
            raise ConfigError(
                "The processor's tokenizer has no pad token, so samples cannot be batched. Set tokenizer.pad_token or "
                "use batch_size=1."
            )
        inputs = self._process(samples, max_text_tokens)
        masks = modality_masks(inputs["input_ids"], inputs["attention_mask"], self._vision_ids)
        self._check(samples, inputs, masks, max_text_tokens)
        real = [ids[mask != 0] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        self._check_prompt(real)
        if self._sees_ahead:
            return AdaptedBatch(inputs, masks, real)
        texts = [ids[mask] for ids, mask in zip(inputs["input_ids"], masks.text, strict=True)]
        return AdaptedBatch(inputs, masks, real, texts)

    def live_masks(self, model: nn.Module) -> AbstractContextManager[LiveMasks | None]:
        """Nothing to observe: :meth:`encode` returns the masks."""
        return nullcontext()

    def _process(self, samples: Sequence[Sample], max_text_tokens: int) -> dict[str, Any]:
        texts = [cut_text(self._tokenizer, sample.text, max_text_tokens) for sample in samples]
        for text, sample in zip(texts, samples, strict=True):
            require_plain_text(self._tokenizer, text, sample.name, self._vision_ids)
        prompts = [self._fill(text) for text in texts]
        if self._is_chat:
            prompts = [self._chat_of(text, sample.name) for text, sample in zip(texts, samples, strict=True)]
        bos, frame = getattr(self._tokenizer, "bos_token", None), self._fill("")
        # Of a chat as apply_chat_template does.
        has_bos = bos is not None and (frame.startswith(bos) if self._is_chat else bos in frame)
        options = {"add_special_tokens": False} if has_bos else {}
        images = [[sample.open_image()] for sample in samples]
        try:
            encoded: Mapping[str, Any] = self._processor(
                images=images, text=prompts, padding=len(samples) > 1, return_tensors="pt", **options
            )
        except Exception as error:
            names = ", ".join(sample.name for sample in samples)
            raise ProbeError(
                f"The processor {type(self._processor).__name__} failed on the probe samples {names}: "
                f"{type(error).__name__}: {error}"
            ) from error
        inputs = {name: value for name, value in encoded.items() if name not in ("labels", "label", "label_ids")}
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        return inputs

    def _fill(self, text: str) -> str:
        return self.prompt.format(image=self._placeholder, text=text)

    def _chat_of(self, text: str, sample: str) -> str:
        """The rendered chat of a sample; ConfigError if the template does more than to put its text into the prompt."""
        rendered = self._render_chat(text)
        for image in (self._placeholder, str(image_token(self._processor))):
            for words in (text, text.strip(), text.lstrip(), text.rstrip()):
                if rendered == self.prompt.format(image=image, text=words):
                    return rendered
        raise ConfigError(
            f"prompt='chat': the chat_template of {type(self._processor).__name__} gives {rendered!r:.120} for the "
            f"text of {sample}, which is not {self.prompt!r} with that text: it changes texts, or from call to call. "
            f"Write the prompt out, such as {EXAMPLE}."
        )

    def _render_chat(self, text: str) -> str:
        user = {"role": "user", "content": [{"type": "image"}]}
        assistant = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        return str(self._processor.apply_chat_template([user, assistant], tokenize=False))

    def _find_format(self, prompt: str | None, model: str) -> str:
        if prompt in (None, PLAIN):
            return PLAIN_FORMAT
        if prompt != CHAT:
            assert prompt is not None
            if is_format(prompt):
                token = str(image_token(self._processor))
                require_no_image_token(prompt, filter(None, (token, *self._placeholder.split(token))))
                return prompt
            raise ConfigError(
                f"prompt={prompt!r}: {model} has no conversations with a name, those are LLaVA's. Use plain, chat or a "
                f"format string, such as {EXAMPLE}."
            )
        name, instead = type(self._processor).__name__, f"Set it, or write the prompt out, such as {EXAMPLE}."
        if getattr(self._processor, "chat_template", None) is None:
            raise ConfigError(f"prompt='chat': {name} has no chat_template. {instead}")
        try:
            rendered = self._render_chat(TEXT)
        except Exception as error:  # of Jinja and of the template itself: any kind
            raise ConfigError(
                f"prompt='chat': the chat_template of {name} failed on an image and a text: {type(error).__name__}: "
                f"{error}. {instead}"
            ) from error
        token = image_token(self._processor)
        found = as_format(rendered, self._placeholder if self._placeholder in rendered else str(token), TEXT)
        if found is None:
            raise ConfigError(
                f"prompt='chat': the chat_template of {name} does not put one {token} and then the text into the "
                f"prompt, but gives {rendered!r}. {instead}"
            )
        return found

    def _check_prompt(self, rows: Sequence[Tensor]) -> None:
        before = before_image(self.prompt).rstrip()
        expected = len(self._tokenizer(before, add_special_tokens=False)["input_ids"]) if before else 0
        for ids in rows:
            if not self._is_chat:
                require_single_ends(self._tokenizer, ids, self.prompt)
            first = int(torch.isin(ids, torch.tensor(self._vision_ids)).nonzero()[0])
            if first < expected:
                raise ConfigError(
                    f"{type(self._processor).__name__} puts the image at token {first}, not after the {expected} "
                    f"tokens that prompt={self.prompt!r} has before it. Use prompt='plain'."
                )

    def _check(
        self, samples: Sequence[Sample], inputs: Mapping[str, Any], masks: ModalityMasks, max_text_tokens: int
    ) -> None:
        for modality, mask in (("vision", masks.vision), ("text", masks.text)):
            for sample, found in zip(samples, mask.any(dim=1).tolist(), strict=True):
                if not found:
                    raise ProbeError(
                        f"Probe sample {sample.name} has no {modality} tokens among its {mask.shape[1]} positions. "
                        "Check that the processor belongs to this model."
                    )
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        length, sample = max(zip(lengths, samples, strict=True), key=lambda pair: pair[0])
        if isinstance(self._max_positions, int) and length > self._max_positions:
            raise ProbeError(
                f"Probe sample {sample.name} has {length} tokens, and the model takes at most {self._max_positions}. "
                f"Build the probe with max_text_tokens below the {max_text_tokens} it has now."
            )


def require_processor(processor: Any) -> Any:
    """The tokenizer of a processor; ConfigError if it does not handle both images and text."""
    if not handles_images(processor):
        lacking = f"{type(processor).__name__} is not a processor of images and text (image_processor and tokenizer)"
        raise ConfigError(f"{'No processor given' if processor is None else lacking}. {REMEDY}")
    return processor.tokenizer


def image_placeholder(processor: Any, tokenizer: Any, config: Any) -> str:
    """The placeholder of one image in a prompt, which the processor expands to the image's tokens.

    Qwen-VL's processors do not add the start and end tokens of an image themselves, so they are added here.
    """
    token = image_token(processor)
    if token is None:
        raise ConfigError(
            f"The processor {type(processor).__name__} has no image_token to refer to an image in a prompt. Write an "
            "adapter for this model and pass adapter=..."
        )
    start, end = getattr(config, "vision_start_token_id", None), getattr(config, "vision_end_token_id", None)
    if start is None or end is None:
        return str(token)
    before, after = tokenizer.convert_ids_to_tokens([start, end])
    return f"{before}{token}{after}"


def image_token(processor: Any) -> Any:
    """The token that stands for an image in a prompt; None if the processor names none."""
    return getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)


def cut_text(tokenizer: Any, text: str, max_tokens: int) -> str:
    """The beginning of a text, at most ``max_tokens`` tokens long."""
    if not getattr(tokenizer, "is_fast", False):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return text if len(ids) <= max_tokens else str(tokenizer.decode(ids[:max_tokens]))
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text if len(offsets) <= max_tokens else text[: offsets[max_tokens - 1][1]]


def require_plain_text(tokenizer: Any, text: str, sample: str, more_special_ids: Iterable[int] = ()) -> None:
    """Raise ProbeError for a text that contains a special token of the tokenizer, or one of ``more_special_ids``.

    The unknown token is allowed.
    """
    special = {*more_special_ids, *getattr(tokenizer, "all_special_ids", ())}
    unknown = getattr(tokenizer, "unk_token_id", None)
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        if token in special and token != unknown:
            raise ProbeError(
                f"The text of {sample} contains the special token {tokenizer.convert_ids_to_tokens(token)!r}. Remove "
                "it, or take another text."
            )
