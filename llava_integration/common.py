# SPDX-License-Identifier: Apache-2.0
"""What LLaVA's code bases have in common: requirements on models, texts, and positions of image features.

In the input ids an image is one placeholder id, which `prepare_inputs_labels_for_multimodal` replaces by the image's
features inside the forward; it also drops padding, truncates and pads again. It moves labels along with the tokens, and
gives image features the ignore label. So we pass marks as labels, and the labels that it returns show what every
position of the new sequence is. All this happens in the ordinary forward, no part of it runs twice.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor, nn

from mir_callback.errors import ConfigError, ProbeError, UnsupportedModelError
from mir_callback.model.modality import ModalityMasks, modality_masks
from mir_callback.probe.adapters import LiveMasks, cut_text, require_plain_text
from mir_callback.probe.probe import Sample
from mir_callback.probe.prompt import TEXT, as_format

METHOD = "prepare_inputs_labels_for_multimodal"
IGNORE_INDEX = -100
DEFAULT_IMAGE = "<image>"
_TEXT_MARK = 1
# Position of the labels, and of the attention mask, in the method's arguments and in the tuple it returns.
_ATTENTION_ARGUMENT, _LABELS_ARGUMENT = 2, 4
_ATTENTION_RESULT, _LABELS_RESULT = 2, 5
# Versions of transformers.
WORKING_FROM, BROKEN_FROM = (4, 36), (4, 52)
TESTED = "transformers==4.37.2 tokenizers==0.15.2 accelerate==0.21.0"


def require_observable(model: nn.Module) -> None:
    """Raise UnsupportedModelError for an unwrapped model that is not a LLaVA with a loaded vision tower."""
    top: Any = model
    name = type(top).__name__
    tower = getattr(top, "get_vision_tower", lambda: None)()
    if not hasattr(top, METHOD) or tower is None:
        raise UnsupportedModelError(
            f"{name} is not a LLaVA model with a vision tower and {METHOD}. Set vision_tower when you load it, or use "
            "another adapter."
        )
    if not getattr(tower, "is_loaded", True):
        raise UnsupportedModelError(
            f"The vision tower {getattr(tower, 'vision_tower_name', tower)} of {name} has no weights yet (delay_load). "
            "Call model.get_vision_tower().load_model() first, as LLaVA's train.py does in initialize_vision_modules."
        )
    if "position_ids" not in inspect.signature(type(top).forward).parameters:
        raise UnsupportedModelError(
            f"The forward of {name} has no position_ids to pass to {METHOD}. LlavaMptForCausalLM as published calls "
            "that method with one argument too few and fails on any input. Use LLaVA's Llama or Mistral model, or "
            "repair the forward."
        )


def is_llava_next(model: nn.Module) -> bool:
    """Whether an unwrapped model that has METHOD is of LLaVA-NeXT and not of the original LLaVA."""
    return "modalities" in inspect.signature(getattr(model, METHOD)).parameters


@contextmanager
def tower_states_checked(model: nn.Module) -> Iterator[None]:
    """Inside, refuse a forward whose vision tower returns more hidden states than it has layers.

    With transformers 5, a tower that LLaVA loaded itself gets its hooks twice once the language model's hidden states
    are requested. From then on the tower returns every state twice, and LLaVA's `select_layer`, which counts from the
    end, silently takes another layer.
    """
    top: Any = model
    inner = getattr(top.get_vision_tower(), "vision_tower", None)
    if not isinstance(inner, transformers.PreTrainedModel):
        yield
        return
    expected = getattr(inner.config, "num_hidden_layers", None)

    def check(_module: nn.Module, _args: Any, output: Any) -> None:
        states = getattr(output, "hidden_states", None)
        if states is not None and expected is not None and len(states) > expected + 1:
            raise UnsupportedModelError(
                f"The vision tower of {type(top).__name__} returns {len(states)} hidden states, not {expected + 1}, so "
                f"mm_vision_select_layer selects the wrong layer: {surroundings()}"
            )

    handle = inner.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


def surroundings() -> str:
    """The installed versions of llava and transformers, and those that work together, for an error message."""
    names = metadata.packages_distributions().get("llava", [])  # of the distribution that has the package
    version = f"{names[0]} {metadata.version(names[0])}" if names else "the package llava"
    return (
        f"{version} is installed with transformers {transformers.__version__} and tokenizers {tokenizers.__version__}, "
        f"but works with transformers 4.36 to 4.51 only. Tested with: pip install {TESTED}"
    )


def explain(error: BaseException) -> str | None:
    """A hint for a script's error if it comes from llava with a transformers that it does not work with, else None."""
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    if WORKING_FROM <= (major, minor) < BROKEN_FROM:
        return None
    modules = (str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__))
    if any(name.partition(".")[0] == "llava" for name in modules):
        return f"{type(error).__name__} in llava: {surroundings()}"
    return None


def require_tokenizer(tokenizer: Any) -> None:
    """Raise ConfigError unless there is a tokenizer."""
    if tokenizer is None:
        raise ConfigError("No tokenizer given. Pass the run's tokenizer, or give it to the Trainer.")


def require_format(filled: str, image: str, name: str | None) -> str:
    """The format string of a conversation filled with ``image`` and TEXT; ConfigError if it does not place both so."""
    found = as_format(filled, image, TEXT)
    if found is None:
        raise ConfigError(
            f"prompt={name!r}: this conversation does not put one image and then the text into the prompt, but gives "
            f"{filled!r}. Use another."
        )
    return found


def plain_text(sample: Sample, tokenizer: Any, max_text_tokens: int, placeholders: Iterable[str]) -> str:
    """A sample's text, cut to ``max_text_tokens``.

    ProbeError if it contains a special token of the tokenizer, or one of the code base's ``placeholders`` in prompts,
    such as ``<image>``.
    """
    for token in placeholders:
        if token in sample.text:
            raise ProbeError(
                f"The text of {sample.name} contains the placeholder {token!r}. Remove it, or take another text."
            )
    text = cut_text(tokenizer, sample.text, max_text_tokens)
    require_plain_text(tokenizer, text, sample.name)
    return text


def pad_right(ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of token ids, (n,) each, as one batch: ids (B, S) and attention mask (B, S) bool.

    These models drop masked positions before the embedding, so padding needs no pad token.
    """
    width = max(len(row) for row in ids)
    batch = torch.zeros(len(ids), width, dtype=torch.long)
    attention = torch.zeros(len(ids), width, dtype=torch.bool)
    for row, tokens in enumerate(ids):
        batch[row, : len(tokens)] = tokens
        attention[row, : len(tokens)] = True
    return batch, attention


def after_image(ids: Sequence[Tensor]) -> list[Tensor]:
    """The token ids after the last image of each sample; image placeholders are negative."""
    return [row[int((row < 0).nonzero()[-1]) + 1 :] for row in ids]


@contextmanager
def spliced_masks(model: nn.Module, placeholder: int, *, every_sample: bool = True) -> Iterator[LiveMasks]:
    """Inside, observe the expansion of image placeholders in every forward of ``model``, which is unwrapped.

    Yields a function that returns the masks of the current forward. Forwards raise UnsupportedModelError if the model
    does not expand images as expected, and with ``every_sample`` ProbeError if a sample has no vision or no text tokens
    after it.
    """
    original: Any = getattr(model, METHOD)
    seen: list[ModalityMasks] = []

    def observed(*arguments: Any, **options: Any) -> Any:
        if len(arguments) <= _LABELS_ARGUMENT or arguments[_ATTENTION_ARGUMENT] is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} calls {METHOD} with other arguments than LLaVA's published code (ids, "
                "positions, attention mask, cache, labels). Write an adapter for this version."
            )
        ids: Tensor = arguments[0]
        marks = torch.where(ids == placeholder, IGNORE_INDEX, _TEXT_MARK)
        result = original(*arguments[:_LABELS_ARGUMENT], marks, *arguments[_LABELS_ARGUMENT + 1 :], **options)
        masks = _masks(model, result)
        if every_sample:
            _check_every_sample(masks)
        seen[:] = [masks]
        return (*result[:_LABELS_RESULT], None)

    def current() -> ModalityMasks:
        if not seen:
            raise UnsupportedModelError(
                f"The forward of {type(model).__name__} did not call {METHOD} before its decoder layers. Write an "
                "adapter for this version."
            )
        return seen.pop()

    setattr(model, METHOD, observed)
    try:
        yield current
    finally:
        delattr(model, METHOD)  # so that the class's method is used again


def _masks(model: nn.Module, result: Any) -> ModalityMasks:
    attention, marks = result[_ATTENTION_RESULT], result[_LABELS_RESULT]
    if not isinstance(marks, Tensor) or not isinstance(attention, Tensor) or marks.shape != attention.shape:
        raise UnsupportedModelError(
            f"{type(model).__name__}.{METHOD} returned {type(attention).__name__} and {type(marks).__name__}, not an "
            "attention mask and labels of the same shape. Write an adapter for this version."
        )
    return modality_masks(marks, attention, (IGNORE_INDEX,))


def _check_every_sample(masks: ModalityMasks) -> None:
    for name, mask in (("vision", masks.vision), ("text", masks.text)):
        if not bool(mask.any(dim=1).all()):
            raise ProbeError(
                f"A probe sample has no {name} tokens left after the model has inserted its image. Raise "
                "tokenizer_model_max_length, as the text after the image is cut off, or check the images."
            )
