# SPDX-License-Identifier: Apache-2.0
"""The adapter for transformers' models and those built like them: their processor encodes the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mir_callback.errors import ConfigError, ProbeError
from mir_callback.model.decoder import text_config, unwrap
from mir_callback.model.modality import ModalityMasks, masks_of, vision_token_ids
from mir_callback.probe.encoding import AdaptedBatch, LiveMasks, cut_text, require_plain_text
from mir_callback.probe.markup import find_markup, vision_of
from mir_callback.probe.probe import Sample
from mir_callback.probe.processors import REMEDY, handles_images
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
        self._image = find_markup(processor, self._tokenizer, top.config, self._vision_ids)
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
        masks = masks_of(vision_of(inputs, self._vision_ids), inputs["attention_mask"])
        self._check(samples, inputs, masks, max_text_tokens)
        real = [ids[mask != 0] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        self._check_prompt(
            real, [row[mask != 0] for row, mask in zip(masks.vision, inputs["attention_mask"], strict=True)]
        )
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
        options = self._image.options | ({"add_special_tokens": False} if has_bos else {})
        images = self._image.arrange([[sample.open_image()] for sample in samples])
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
        return self.prompt.format(image=self._image.written, text=text)

    def _chat_of(self, text: str, sample: str) -> str:
        """The rendered chat of a sample; ConfigError if the template does more than to put its text into the prompt."""
        rendered = self._render_chat(text)
        for image in (self._image.written, self._image.token):
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
                require_no_image_token(prompt, self._image.pieces)
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
        token, written = self._image.token, self._image.written
        found = as_format(rendered, written if written in rendered else token, TEXT) if token else None
        if found is None:
            raise ConfigError(
                f"prompt='chat': the chat_template of {name} does not put one {token} and then the text into the "
                f"prompt, but gives {rendered!r}. {instead}"
            )
        return found

    def _check_prompt(self, rows: Sequence[Tensor], vision: Sequence[Tensor]) -> None:
        before = before_image(self.prompt).rstrip()
        expected = len(self._tokenizer(before, add_special_tokens=False)["input_ids"]) if before else 0
        for ids, is_vision in zip(rows, vision, strict=True):
            if not self._is_chat:
                require_single_ends(self._tokenizer, ids, self.prompt)
            first = int(is_vision.nonzero()[0])
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
