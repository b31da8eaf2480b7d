# SPDX-License-Identifier: Apache-2.0
"""Models of the package `llava`: haotian-liu/LLaVA, and LLaVA-VL/LLaVA-NeXT (LLaVA-NeXT, LLaVA-OneVision).

LLaVA-NeXT's adapter passes what LLaVA-NeXT's own collator passes, as its image expansion depends on it: images as a
list even if their shapes are equal (a stacked batch would miss the newline feature of `spatial_unpad`), the size of
every image, and the modality "image" for every sample (samples without one are dropped).
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava_integration.common import (
    DEFAULT_IMAGE,
    METHOD,
    after_image,
    is_llava_next,
    pad_right,
    plain_text,
    require_format,
    require_observable,
    require_tokenizer,
    spliced_masks,
    tower_states_checked,
)
from mir_callback import distributed
from mir_callback.console import log
from mir_callback.errors import ConfigError, ProbeError, UnsupportedModelError
from mir_callback.model.decoder import unwrap
from mir_callback.probe.adapters import AdaptedBatch, LiveMasks, package_of
from mir_callback.probe.probe import Sample
from mir_callback.probe.prompt import CHAT, TEXT, check_prompt, is_format, require_no_image_token, require_single_ends

PROJECTOR_FILE = "mm_projector.bin"


def make_adapter(
    model: nn.Module, processor: Any, *, prompt: str | None = None, trainer: Any = None
) -> OriginalLlavaAdapter | None:
    """The adapter of a model of this package, see :func:`mir_callback.probe.adapters.register_adapter`."""
    top = unwrap(model)
    if package_of(top) != "llava" or not hasattr(top, METHOD):
        return None
    family = LlavaNextAdapter if is_llava_next(top) else OriginalLlavaAdapter
    return family(model, processor, prompt=prompt)


class OriginalLlavaAdapter:
    """Encodes samples as LLaVA's own training and inference code does, and observes its image expansion.

    Args:
        model: the model, bare or wrapped.
        tokenizer: the run's tokenizer; it needs no pad token.
        prompt: name of a conversation template ("plain", "v1", "vicuna_v1", "llama_2", ...), or a format string with
            {image} and {text}; by default the run's own template (`llava.conversation.default_conversation`), which
            "chat" requires to be another than "plain". "plain", the template of pre-training, is image, text, newline;
            others put the image into the first turn and the text into the reply: "vicuna_v1" is that of MIR's authors.

    Attributes:
        prompt: the prompt as a format string.

    Raises:
        ConfigError: no tokenizer, an unknown template, a format string without places for image and text.
        UnsupportedModelError: see :func:`require_observable`.

    Example::

        adapter = OriginalLlavaAdapter(model, tokenizer, prompt="vicuna_v1")
        evaluate_mir(model, probe, adapter=adapter)
    """

    _for_llava_next = False

    def __init__(self, model: nn.Module, tokenizer: Any, *, prompt: str | None = None) -> None:
        check_prompt(prompt)
        top: Any = unwrap(model)
        require_observable(top)
        if (is_next := is_llava_next(top)) != self._for_llava_next:
            own = "LLaVA-NeXT. Use LlavaNextAdapter." if is_next else "the original LLaVA. Use OriginalLlavaAdapter."
            raise UnsupportedModelError(f"{type(self).__name__}: {type(top).__name__} is a model of {own}")
        require_tokenizer(tokenizer)
        self._config = top.config
        self._aspect_ratio: str | None = getattr(top.config, "image_aspect_ratio", None)
        self._tokenizer = tokenizer
        self._image_processor = top.get_vision_tower().image_processor
        self._template: Any = None if prompt is not None and is_format(prompt) else _template(prompt)
        if self._template is None:
            assert prompt is not None
            require_no_image_token(prompt, _placeholders())
            self.prompt = prompt
        else:
            self.prompt = require_format(self._prompt(DEFAULT_IMAGE, TEXT), DEFAULT_IMAGE, prompt)

    def encode(self, samples: Sequence[Sample], max_text_tokens: int) -> AdaptedBatch:
        """See :class:`mir_callback.probe.adapters.Adapter`."""
        ids = [self._ids(sample, max_text_tokens) for sample in samples]
        input_ids, attention = pad_right(ids)
        pictures = [sample.open_image() for sample in samples]
        pixels = [self._pixels(sample, picture) for sample, picture in zip(samples, pictures, strict=True)]
        inputs = {"input_ids": input_ids, "attention_mask": attention, **self._image_inputs(pixels, pictures)}
        return AdaptedBatch(inputs, None, ids, after_image(ids))

    @contextmanager
    def live_masks(self, model: nn.Module) -> Iterator[LiveMasks | None]:
        """See :func:`spliced_masks`."""
        from llava.constants import IMAGE_TOKEN_INDEX

        with tower_states_checked(model), spliced_masks(model, IMAGE_TOKEN_INDEX) as current:
            yield current

    def weight_saver(self, trainer: Any) -> ProjectorSaver | None:
        """See :class:`mir_callback.integrations.huggingface.OffersSaver`.

        Not None if only the projector is trained, as the Trainer's `save_model` then writes no weights.
        """
        args = getattr(trainer, "args", None)
        parts = (getattr(args, "mm_tunable_parts", None) or "").split(",")  # LLaVA-NeXT's
        alone = getattr(args, "tune_mm_mlp_adapter", False) or parts in (["mm_mlp_adapter"], ["mm_vision_resampler"])
        return ProjectorSaver(trainer) if alone and _gather_of(trainer) is not None else None

    def _ids(self, sample: Sample, max_text_tokens: int) -> Tensor:
        from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
        from llava.mm_utils import tokenizer_image_token

        image = DEFAULT_IMAGE_TOKEN
        if getattr(self._config, "mm_use_im_start_end", False):
            image = f"{DEFAULT_IM_START_TOKEN}{image}{DEFAULT_IM_END_TOKEN}"
        text = plain_text(sample, self._tokenizer, max_text_tokens, _placeholders())
        prompt = self._prompt(image, text)
        tokens: Tensor = tokenizer_image_token(prompt, self._tokenizer, return_tensors="pt")
        if self._template is None:
            require_single_ends(self._tokenizer, tokens, self.prompt)
        return tokens

    def _prompt(self, image: str, text: str) -> str:
        from llava.conversation import SeparatorStyle

        if self._template is None:
            return self.prompt.format(image=image, text=text)
        if self._template.sep_style == SeparatorStyle.PLAIN:
            return f"{image}{text}{self._template.sep}"
        conversation = self._conversation()
        conversation.append_message(conversation.roles[0], f"{image}\n")
        conversation.append_message(conversation.roles[1], text)
        return str(conversation.get_prompt())

    def _pixels(self, sample: Sample, picture: Any) -> Tensor:
        """(3, H, W), or (tiles, 3, H, W) for anyres; one image at a time, as in LLaVA's training."""
        from llava.mm_utils import process_images

        try:
            pixels: Tensor = process_images([picture], self._image_processor, self._config)[0]
        except Exception as error:  # from Pillow, NumPy, transformers or LLaVA: any kind
            raise ProbeError(
                f"LLaVA's process_images failed on the image of {sample.name} ({picture.width} x {picture.height} "
                f"pixels, image_aspect_ratio={self._aspect_ratio!r}): {type(error).__name__}: {error}. Replace or "
                "remove that image, or check that the model's configuration fits its processor."
            ) from error
        return pixels

    def _conversation(self) -> Any:
        """The template without messages."""
        conversation = self._template.copy()
        conversation.messages = []
        return conversation

    def _image_inputs(self, pixels: list[Tensor], pictures: list[Any]) -> dict[str, Any]:
        """Arguments of the forward for the images: one tensor, or a list if anyres makes different numbers of tiles."""
        alike = len({image.shape for image in pixels}) == 1
        inputs: dict[str, Any] = {"images": torch.stack(pixels) if alike else pixels}
        if "anyres" in (self._aspect_ratio or ""):
            inputs["image_sizes"] = [picture.size for picture in pictures]
        return inputs


def _placeholders() -> tuple[str, ...]:
    """What stands for an image, or around one, in LLaVA's prompts."""
    from llava import constants

    names = ("DEFAULT_IMAGE_TOKEN", "DEFAULT_IMAGE_PATCH_TOKEN", "DEFAULT_IM_START_TOKEN", "DEFAULT_IM_END_TOKEN")
    return tuple(getattr(constants, name) for name in names)


def _template(name: str | None) -> Any:
    from llava import conversation

    own, templates = conversation.default_conversation, conversation.conv_templates
    if name is None or (name == CHAT and own.sep_style != conversation.SeparatorStyle.PLAIN):
        return own
    if name not in templates:
        why = "the run's own conversation is that of pre-training" if name == CHAT else "there is no such conversation"
        raise ConfigError(
            f"prompt={name!r}, but {why}. Use one of {', '.join(sorted(templates))}, a format string, or leave it out "
            "to use the run's own."
        )
    return templates[name]


class LlavaNextAdapter(OriginalLlavaAdapter):
    """Encodes samples as LLaVA-NeXT's own training code does, and observes its image expansion.

    Args:
        model: the model, bare or wrapped.
        tokenizer: the run's tokenizer.
        prompt: as of :class:`OriginalLlavaAdapter`, or "qwen_1_5", ...

    Raises:
        ConfigError: no tokenizer, an unknown template.
        UnsupportedModelError: the model has no vision tower, does not expand images as LLaVA does, or its forward takes
            no modalities.
    """

    _for_llava_next = True

    def __init__(self, model: nn.Module, tokenizer: Any, *, prompt: str | None = None) -> None:
        super().__init__(model, tokenizer, prompt=prompt)
        kind = type(unwrap(model))
        if "modalities" not in inspect.signature(kind.forward).parameters:
            raise UnsupportedModelError(
                f"{kind.__name__}.forward has no argument modalities, which LLaVA-NeXT's collator passes. Use "
                "LlavaQwen, LlavaLlama or LlavaMixtral, or write an adapter."
            )

    def _image_inputs(self, pixels: list[Tensor], pictures: list[Any]) -> dict[str, Any]:
        """One image per sample: (3, H, W), or (T, 3, H, W) in tiles."""
        return {
            "images": pixels,
            "image_sizes": [picture.size for picture in pictures],
            "modalities": ["image"] * len(pictures),
        }

    def _conversation(self) -> Any:
        """The template with our tokenizer: Llama 3's needs one, and loses its own when copied."""
        conversation = super()._conversation()
        conversation.tokenizer = self._tokenizer
        return conversation


class ProjectorSaver:
    """Saves `mm_projector.bin` and the configuration, like LLaVA's own stage-1 checkpoints.

    Weights are collected by LLaVA's own function, which gathers them one by one under ZeRO-3.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        log.info("only the projector is trained, so keep_best saves only %s and the configuration", PROJECTOR_FILE)

    def __call__(self, folder: Path) -> None:
        """See :class:`mir_callback.best_model.WeightSaver`."""
        names = ["mm_projector", "vision_resampler"]
        if getattr(self._trainer.args, "use_im_start_end", False):
            names += ["embed_tokens", "embed_in"]
        weights = _gather_of(self._trainer)(self._trainer.model.named_parameters(), names)
        if distributed.is_main():
            self._trainer.model.config.save_pretrained(str(folder))
            torch.save(weights, os.path.join(folder, PROJECTOR_FILE))


def _gather_of(trainer: Any) -> Any:
    """LLaVA's function that collects projector weights, from the module of the Trainer or one of its base classes."""
    for cls in type(trainer).__mro__:
        found = getattr(sys.modules.get(cls.__module__), "get_mm_adapter_state_maybe_zero_3", None)
        if found is not None:
            return found
    return None
