# SPDX-License-Identifier: Apache-2.0
"""The adapter for transformers' models and those built like them: their processor encodes the samples."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from mir_callback.errors import ConfigError, ProbeError, UnsupportedModelError
from mir_callback.model.decoder import text_config, unwrap
from mir_callback.model.modality import (
    AFTER_IMAGE,
    EVERY,
    ModalityMasks,
    count_all_text,
    masks_of,
    parse_ids,
    vision_token_ids,
    write_ids,
)
from mir_callback.probe.encoding import AdaptedBatch, LiveMasks, cut_text, require_plain_text
from mir_callback.probe.markup import Markup, as_frames, find_markup, vision_of
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
from mir_callback.probe.sample import IMAGE, Sample

# Families in which text after the image attends to later text, so that no loss of it is a prediction.
_SHOWN = 80  # characters of a text in a description
_SEE_AHEAD = ("paligemma",)


@dataclass
class _Written:
    """A sample as a processor takes it."""

    prompt: str = ""
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)


class HuggingFaceAdapter:
    """Encodes samples with a transformers processor: the image, then the text, and a prompt around them if asked.

    Args:
        model: a vision-language model of transformers, bare or wrapped; only its configuration is read.
        processor: its processor, with `image_processor` and `tokenizer`.
        prompt: "plain" (None) is image, then text, as in LLaVA's pre-training; "chat" the processor's chat template
            with the image as the user's turn and the text as the assistant's, as MIR's authors do; else a format string
            with {image} and {text}. It goes to the processor, which adds its special tokens as it does in any call.
            Samples of other layouts have only the plain one: their parts in order.
        text_positions: which positions count as text, see :class:`mir_callback.config.MIRConfig`.
        vision_ids: ids of vision tokens, likewise.

    Attributes:
        prompt: the prompt as a format string.
        text_positions, vision_ids: as given.

    Raises:
        UnsupportedModelError: the model's configuration names no image token, so the model has no vision tokens.
        ConfigError: the processor does not handle both images and text, names no image token, or has no chat template
            that places an image and then a text; or the prompt is none of these.

    Example::

        adapter = HuggingFaceAdapter(model, AutoProcessor.from_pretrained("llava-hf/llava-1.5-7b-hf"))
        batch = adapter.encode(probe.samples[:4], probe.max_text_tokens)
        batch.masks.vision.sum(dim=1)  # vision tokens of each sample
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        prompt: str | None = None,
        text_positions: str = AFTER_IMAGE,
        vision_ids: str | None = None,
    ) -> None:
        check_prompt(prompt)
        self.text_positions = text_positions
        self.vision_ids = write_ids(ids) if (ids := parse_ids(vision_ids)) else None
        top: Any = unwrap(model)
        self._sees_ahead = getattr(top.config, "model_type", None) in _SEE_AHEAD
        self._max_positions = getattr(text_config(top), "max_position_embeddings", None)
        # First, as a text-only model has no processor that could be missing.
        self._vision_ids = vision_token_ids(top, vision_ids)
        self._processor, self._config = processor, top.config
        self._tokenizer = require_processor(processor)
        self._image = find_markup(processor, self._tokenizer, top.config, self._vision_ids)
        self._video: Markup | None = None  # found when there is one to encode
        added = self._tokenizer.get_added_vocab()
        written = self._tokenizer(self._image.written, add_special_tokens=False)["input_ids"]
        self._marks = [token for token in written if token in set(added.values())]  # that a text must not have
        own = inspect.signature(type(top).forward).parameters.get("pixel_values")
        is_required = own is not None and own.default is inspect.Parameter.empty
        self._needs_image = is_required or not self._vision_ids  # images by a mask of positions: each row has them
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
        ids, attention = inputs["input_ids"], inputs["attention_mask"]
        every = self.text_positions == EVERY
        whole = torch.tensor([every or not sample.has_vision for sample in samples])
        masks = masks_of(vision_of(inputs, self._vision_ids), attention)
        masks = count_all_text(masks, ids, attention, self._tokenizer.all_special_ids, whole)
        self._check(samples, inputs, masks, max_text_tokens)
        real = [row[mask != 0] for row, mask in zip(ids, attention, strict=True)]
        if all(sample.is_pair for sample in samples):
            self._check_prompt(real, [row[mask != 0] for row, mask in zip(masks.vision, attention, strict=True)])
        if self._sees_ahead:
            return AdaptedBatch(inputs, masks, real)
        texts = [ids[mask] for ids, mask in zip(inputs["input_ids"], masks.text, strict=True)]
        return AdaptedBatch(inputs, masks, real, texts)

    def describe(self, sample: Sample, max_text_tokens: int) -> str | None:
        """A sample as the model gets it: its tokens in words, runs of vision tokens by their length. Ranks: pure.

        None if only a forward shows where vision tokens are.

        Example::

            adapter.describe(probe.samples[0], 1024)  # "<s><|vision_start|>[256 x <|image_pad|>]<|vision_end|>A dog"
        """
        batch = self.encode([sample], max_text_tokens)
        if batch.masks is None:
            return None
        tokens = zip(batch.token_ids[0].tolist(), batch.masks.vision[0].tolist(), strict=True)
        pieces = []
        for is_vision, group in groupby(tokens, key=lambda token: token[1]):
            ids = [token for token, _ in group]
            words = str(self._tokenizer.decode(ids if not is_vision else ids[:1]))
            kinds = len(set(ids))
            of = words if kinds == 1 else f"{kinds} kinds of image tokens"
            pieces.append(f"[{len(ids)} x {of}]" if is_vision else shorten(words))
        return "".join(pieces)

    def live_masks(self, model: nn.Module) -> AbstractContextManager[LiveMasks | None]:
        """Nothing to observe: :meth:`encode` returns the masks."""
        return nullcontext()

    def _process(self, samples: Sequence[Sample], max_text_tokens: int) -> dict[str, Any]:
        written = [self._write(sample, max_text_tokens) for sample in samples]
        bos, frame = getattr(self._tokenizer, "bos_token", None), self._fill("")
        # Of a chat as apply_chat_template does.
        has_bos = bos is not None and (frame.startswith(bos) if self._is_chat else bos in frame)
        options: dict[str, Any] = {"add_special_tokens": False} if has_bos else {}
        if any(each.images for each in written):
            options |= self._image.options | {"images": self._image.arrange([each.images for each in written])}
        if any(each.videos for each in written):
            assert self._video is not None
            options |= self._video.options | {"videos": self._video.arrange([each.videos for each in written])}
        prompts = [each.prompt for each in written]
        try:
            encoded: Mapping[str, Any] = self._processor(
                text=prompts, padding=len(samples) > 1, return_tensors="pt", **options
            )
        except Exception as error:
            names = ", ".join(sample.name for sample in samples)
            alone = not any(sample.has_vision for sample in samples)
            hint = ". Does it need an image in every sample? Then: text_only='leave_out'" if alone else ""
            raise ProbeError(
                f"The processor {type(self._processor).__name__} failed on the probe samples {names}: "
                f"{type(error).__name__}: {error}{hint}"
            ) from error
        inputs = {name: value for name, value in encoded.items() if name not in ("labels", "label", "label_ids")}
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        return inputs

    def _write(self, sample: Sample, max_text_tokens: int) -> _Written:
        """A sample as the processor takes it: each of its texts cut, a placeholder where an image or video stands."""
        found, text = _Written(), ""
        for part in sample.open_parts():
            if isinstance(part, str):
                text = cut_text(self._tokenizer, part, max_text_tokens)
                require_plain_text(self._tokenizer, text, sample.name, (*self._vision_ids, *self._marks))
                found.prompt += text
            elif isinstance(part, list):
                found.prompt += self._video_markup(sample).written
                found.videos.append(as_frames(part))
            else:
                found.prompt += self._image.written
                found.images.append(part)
        if self._needs_image and not found.images:
            raise ProbeError(
                f"{sample.name} holds {sample.describe()}, and the model needs an image in every sample. Remove it, or "
                "set text_only='leave_out'."
            )
        if sample.is_pair:
            found.prompt = self._chat_of(text, sample.name) if self._is_chat else self._fill(text)
        elif self.prompt != PLAIN_FORMAT:
            raise ProbeError(
                f"prompt={self.prompt!r} is for samples of one image, then one text; {sample.name} holds "
                f"{sample.describe()}. Leave the prompt out."
            )
        elif not self._image.written and sample.has_vision:
            raise ProbeError(
                f"{sample.name} holds {sample.describe()}, but {type(self._processor).__name__} puts the image first "
                "by itself: it takes one image, then one text."
            )
        return found

    def _video_markup(self, sample: Sample) -> Markup:
        """How a video is written; ProbeError for a family without one."""
        if self._video is None:
            known = (self._processor, self._tokenizer, self._config, self._vision_ids)
            try:
                self._video = find_markup(*known, kind="video")
            except (ConfigError, UnsupportedModelError) as error:
                raise ProbeError(
                    f"{sample.name} holds {sample.describe()}, and the model takes no video: {error}"
                ) from error
        return self._video

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

    def _fail(self, sample: Sample, masks: ModalityMasks, modality: str, remedy: str) -> NoReturn:
        places = masks.vision.shape[1]
        raise ProbeError(f"Probe sample {sample.name} has no {modality} tokens among its {places} positions. {remedy}")

    def _check(
        self, samples: Sequence[Sample], inputs: Mapping[str, Any], masks: ModalityMasks, max_text_tokens: int
    ) -> None:
        end = self._marks[-1] if self._marks and self._image.written != self._image.token else None
        for sample, ids in zip(samples, inputs["input_ids"].tolist(), strict=True):
            last = next((part for part in reversed(sample.parts) if not isinstance(part, str) or part.strip()), "")
            if not isinstance(last, str) and self.text_positions != EVERY:
                raise ProbeError(
                    f"Probe sample {sample.name} ({sample.describe()}) has no text after its last image. "
                    "text_positions='all' counts all of its text; else remove it."
                )
            images = sample.kinds.count(IMAGE)
            if end is not None and end not in self._vision_ids and ids.count(end) < images:
                words = self._tokenizer.convert_ids_to_tokens(end)
                raise ProbeError(
                    f"Probe sample {sample.name} has {images} images and {ids.count(end)} of their {words!r}: "
                    f"{type(self._processor).__name__} cuts what is too long. Build the probe with fewer images or "
                    "less text."
                )
        vision, text = masks.vision.any(dim=1).tolist(), masks.text.any(dim=1).tolist()
        for sample, has_vision, has_text in zip(samples, vision, text, strict=True):
            if sample.has_vision and not has_vision:
                self._fail(sample, masks, "vision", "Check that the processor belongs to this model.")
            if not has_text and sample.is_pair:
                self._fail(sample, masks, "text", "Check that the processor belongs to this model.")
            if not has_text:
                remedy = "text_positions='all' counts all of its text, not only what follows the last image."
                self._fail(sample, masks, "text", remedy)
        lengths = inputs["attention_mask"].sum(dim=1).tolist()
        length, sample = max(zip(lengths, samples, strict=True), key=lambda pair: pair[0])
        if isinstance(self._max_positions, int) and length > self._max_positions:
            own = int(masks.vision[list(samples).index(sample)].sum())
            raise ProbeError(
                f"Probe sample {sample.name} has {length} tokens, {own} of them of images and videos, and the model "
                f"takes at most {self._max_positions}. Build the probe with max_text_tokens below the "
                f"{max_text_tokens} it has now, or with fewer or smaller images and frames."
            )


def shorten(words: str) -> str:
    """The beginning and the end of a text."""
    return words if len(words) <= _SHOWN else f"{words[: _SHOWN // 2]} ... {words[-_SHOWN // 2 :]}"


def require_processor(processor: Any) -> Any:
    """The tokenizer of a processor; ConfigError if it does not handle both images and text."""
    if not handles_images(processor):
        lacking = f"{type(processor).__name__} is not a processor of images and text (image_processor and tokenizer)"
        raise ConfigError(f"{'No processor given' if processor is None else lacking}. {REMEDY}")
    return processor.tokenizer
