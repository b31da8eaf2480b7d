# SPDX-License-Identifier: Apache-2.0
"""Models of the package `tinyllava`: TinyLLaVA Factory.

They expand images like the original LLaVA, but have image processor and tokenizer in the model, call their language
model's `forward` directly, and have their own templates and image preprocessing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from llava_integration.common import (
    DEFAULT_IMAGE,
    METHOD,
    after_image,
    pad_right,
    plain_text,
    require_format,
    require_tokenizer,
    spliced_masks,
)
from mir_callback.errors import ConfigError, UnsupportedModelError
from mir_callback.model.decoder import unwrap
from mir_callback.probe.adapters import AdaptedBatch, LiveMasks, package_of
from mir_callback.probe.probe import Sample
from mir_callback.probe.prompt import (
    CHAT,
    PLAIN,
    TEXT,
    check_prompt,
    is_format,
    require_no_image_token,
    require_single_ends,
)

PRETRAIN = "pretrain"  # the template of its first stage


def make_adapter(
    model: nn.Module, processor: Any, *, prompt: str | None = None, trainer: Any = None
) -> TinyLlavaAdapter | None:
    """The adapter of a model of this package, see :func:`mir_callback.probe.adapters.register_adapter`."""
    top = unwrap(model)
    if package_of(top) != "tinyllava" or not hasattr(top, METHOD):
        return None
    # The template of TinyLLaVA's training script.
    data_arguments = getattr(getattr(trainer, "train_dataset", None), "data_args", None)
    own = getattr(data_arguments, "conv_version", None)
    if prompt is None or (prompt == CHAT and own != PRETRAIN):
        prompt = own or prompt
    return TinyLlavaAdapter(model, processor, prompt=prompt)


class TinyLlavaAdapter:
    """Encodes samples like TinyLLaVA's training data, and observes the model's image expansion.

    Args:
        model: the model, bare or wrapped.
        tokenizer: the run's tokenizer; None for the one in the model.
        prompt: name of a TinyLLaVA template ("pretrain", "phi", "llama", ...), its `--conv_version`, or a format string
            with {image} and {text}; by default "pretrain", also called "plain": image, text, newline. The other
            templates put the image into the first turn and the text into the reply.

    Attributes:
        prompt: the prompt as a format string.

    Raises:
        ConfigError: no tokenizer, an unknown template, a format string without places for image and text, an
            image_aspect_ratio its models cannot take.
        UnsupportedModelError: the model has no image processor or does not expand images as TinyLLaVA does.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, prompt: str | None = None) -> None:
        check_prompt(prompt)
        top: Any = unwrap(model)
        image_processor = getattr(getattr(top, "vision_tower", None), "_image_processor", None)
        if not hasattr(top, METHOD) or image_processor is None:
            raise UnsupportedModelError(
                f"{type(top).__name__} is not a TinyLLaVA model with vision_tower._image_processor and {METHOD}. Use "
                "another adapter."
            )
        self._tokenizer: Any = getattr(top, "tokenizer", None) if tokenizer is None else tokenizer
        require_tokenizer(self._tokenizer)
        self._preprocess_image = _image_preprocess(image_processor, top.config)
        self._is_written = prompt is not None and is_format(prompt)
        self._preprocess_text = _text_preprocess(self._tokenizer, None if self._is_written else prompt)
        if self._is_written:
            assert prompt is not None
            require_no_image_token(prompt, [DEFAULT_IMAGE])
            self.prompt = prompt
        else:
            self.prompt = require_format(self._encode(TEXT)["prompt"], DEFAULT_IMAGE, prompt)

    def encode(self, samples: Sequence[Sample], max_text_tokens: int) -> AdaptedBatch:
        """See :class:`mir_callback.probe.adapters.Adapter`."""
        ids = [self._ids(sample, max_text_tokens) for sample in samples]
        input_ids, attention = pad_right(ids)
        images = torch.stack([self._preprocess_image(sample.open_image()) for sample in samples])  # (B, 3, H, W)
        inputs = {"input_ids": input_ids, "attention_mask": attention, "images": images}
        return AdaptedBatch(inputs, None, ids, after_image(ids))

    def live_masks(self, model: nn.Module) -> AbstractContextManager[LiveMasks | None]:
        """See :func:`spliced_masks`."""
        from tinyllava.utils.constants import IMAGE_TOKEN_INDEX

        return spliced_masks(model, IMAGE_TOKEN_INDEX)

    def _ids(self, sample: Sample, max_text_tokens: int) -> Tensor:
        text = plain_text(sample, self._tokenizer, max_text_tokens, (DEFAULT_IMAGE,))
        ids: Tensor
        if self._is_written:
            filled = self.prompt.format(image=DEFAULT_IMAGE, text=text)
            tokenize = self._preprocess_text.template.tokenizer_image_token
            ids = tokenize(filled, self._tokenizer, return_tensors="pt")
            require_single_ends(self._tokenizer, ids, self.prompt)
        else:
            ids = self._encode(text)["input_ids"]
        return ids

    def _encode(self, text: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": f"{DEFAULT_IMAGE}\n"}, {"from": "gpt", "value": text}]
        # Mode "train" would also make labels, and sleep for seconds if it cannot.
        encoded: dict[str, Any] = self._preprocess_text(turns, mode="eval")
        return encoded


def _image_preprocess(image_processor: Any, config: Any) -> Any:
    from tinyllava.data.image_preprocess import ImagePreprocess

    if getattr(config, "image_aspect_ratio", None) == "anyres":
        raise ConfigError(
            "image_aspect_ratio='anyres' does not work with TinyLLaVA: it splits images into tiles, but its models "
            "take one tile per image. Set model.config.image_aspect_ratio to 'square' or 'pad'."
        )
    return ImagePreprocess(image_processor, config)


def _text_preprocess(tokenizer: Any, prompt: str | None) -> Any:
    from tinyllava.data.text_preprocess import TextPreprocess

    try:
        return TextPreprocess(tokenizer, PRETRAIN if prompt in (None, PLAIN) else prompt)
    except AssertionError as error:  # TinyLLaVA's error for an unknown name
        raise ConfigError(
            f"prompt={prompt!r} is not a template of tinyllava.data.template. Use the --conv_version of a "
            "training script, such as pretrain, phi or llama."
        ) from error
