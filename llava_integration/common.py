# SPDX-License-Identifier: Apache-2.0
"""What LLaVA's code bases have in common: what their models must fulfil, texts, and where image features end up.

An image is one id of a text, its placeholder, which `prepare_inputs_labels_for_multimodal` replaces by the image's
features inside the forward; it also drops padding, truncates and pads anew. It treats labels as it treats tokens, and
gives image features the ignore label. So marks are passed in place of labels, and the labels that come out say what
every position of the new sequence is. The ordinary forward does all this itself, no part of it is run twice.
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

METHOD = "prepare_inputs_labels_for_multimodal"
IGNORE_INDEX = -100
_TEXT_MARK = 1
# Position of the labels, and of the attention mask, in the method's arguments and in the tuple it returns.
_ATTENTION_ARGUMENT, _LABELS_ARGUMENT = 2, 4
_ATTENTION_RESULT, _LABELS_RESULT = 2, 5
# Versions of transformers.
WORKING_FROM, BROKEN_FROM = (4, 36), (4, 52)
TESTED = "transformers==4.37.2 tokenizers==0.15.2 accelerate==0.21.0"


def require_observable(model: nn.Module) -> None:
    """Refuse an unwrapped model that places no images, has no tower or an unloaded one, or whose forward would fail."""
    top: Any = model
    name = type(top).__name__
    tower = getattr(top, "get_vision_tower", lambda: None)()
    if not hasattr(top, METHOD) or tower is None:
        raise UnsupportedModelError(
            f"{name} must be a LLaVA model with a vision tower and {METHOD}; "
            "load it with vision_tower set, or use the adapter of its family"
        )
    if not getattr(tower, "is_loaded", True):
        raise UnsupportedModelError(
            f"the vision tower of {name} must be loaded, got {getattr(tower, 'vision_tower_name', tower)} without "
            "weights (delay_load); call model.get_vision_tower().load_model() first, as LLaVA's train.py does in "
            "initialize_vision_modules"
        )
    if "position_ids" not in inspect.signature(type(top).forward).parameters:
        raise UnsupportedModelError(
            f"the forward of {name} must take position_ids and hand them to {METHOD}, got one without; "
            "LlavaMptForCausalLM as published calls that method one argument short and fails on any input: "
            "use LLaVA's Llama or Mistral model, or repair its forward"
        )


def is_llava_next(model: nn.Module) -> bool:
    """Whether an unwrapped model with METHOD is LLaVA-NeXT's and not the original LLaVA's."""
    return "modalities" in inspect.signature(getattr(model, METHOD)).parameters


@contextmanager
def tower_states_checked(model: nn.Module) -> Iterator[None]:
    """While open, refuse a forward whose vision tower returns more hidden states than it has layers.

    transformers 5 hooks a tower that LLaVA has loaded by itself a second time once somebody asks for the language
    model's hidden states; from then on the tower returns every state twice, and LLaVA's `select_layer` counted from
    the end takes another layer without a word.
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
                f"the vision tower of {type(top).__name__} must return {expected + 1} hidden states, got "
                f"{len(states)}, so that mm_vision_select_layer takes another layer than before; {surroundings()}"
            )

    handle = inner.register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


def surroundings() -> str:
    """The versions that matter to llava here, the ones that work, and the remedy, as one clause."""
    names = metadata.packages_distributions().get("llava", [])  # of the distribution that the package came in
    version = f"{names[0]} {metadata.version(names[0])}" if names else "the package llava"
    return (
        f"{version} runs here with transformers {transformers.__version__} and tokenizers {tokenizers.__version__}; "
        f"it works with transformers 4.36 to 4.51, tested with: pip install {TESTED}"
    )


def explain(error: BaseException) -> str | None:
    """What to say beside a script's failure if llava met a transformers it does not work with, else None."""
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    if WORKING_FROM <= (major, minor) < BROKEN_FROM:
        return None
    modules = (str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__))
    if any(name.partition(".")[0] == "llava" for name in modules):
        return f"{type(error).__name__} while llava was at work: {surroundings()}"
    return None


def require_tokenizer(tokenizer: Any) -> None:
    """Raise ConfigError unless there is a tokenizer."""
    if tokenizer is None:
        raise ConfigError("tokenizer must be given, got None; pass the run's tokenizer, or give it to the Trainer")


def plain_text(sample: Sample, tokenizer: Any, max_text_tokens: int, placeholders: Iterable[str]) -> str:
    """A sample's text, cut to ``max_text_tokens``.

    ProbeError if it holds a control token of the tokenizer, or one of the ``placeholders``, such as ``<image>``, that
    the code base replaces in prompts by something else.
    """
    for token in placeholders:
        if token in sample.text:
            raise ProbeError(
                f"probe text of {sample.name} must be plain text, got {token!r} in it; remove or rewrite it"
            )
    text = cut_text(tokenizer, sample.text, max_text_tokens)
    require_plain_text(tokenizer, text, sample.name)
    return text


def pad_right(ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of token ids, (n,) each, as one batch: ids (B, S) and their attention mask (B, S) bool.

    The fill is never read, as these models drop what the mask leaves out before they embed anything; so a tokenizer
    without a pad token will do. The mask follows the lengths, as texts can hold any id.
    """
    width = max(len(row) for row in ids)
    batch = torch.zeros(len(ids), width, dtype=torch.long)
    attention = torch.zeros(len(ids), width, dtype=torch.bool)
    for row, tokens in enumerate(ids):
        batch[row, : len(tokens)] = tokens
        attention[row, : len(tokens)] = True
    return batch, attention


def after_image(ids: Sequence[Tensor]) -> list[Tensor]:
    """Of each sample's token ids those after its last image, whose placeholder is negative."""
    return [row[int((row < 0).nonzero()[-1]) + 1 :] for row in ids]


@contextmanager
def spliced_masks(model: nn.Module, placeholder: int, *, every_sample: bool = True) -> Iterator[LiveMasks]:
    """While open, observe the expansion of image placeholders in every forward of ``model``, which is unwrapped.

    Yields a function that gives the masks of the forward under way. UnsupportedModelError if that does not expand
    images, or not as expected; ProbeError if one of ``every_sample`` has no vision or no text tokens left after it.
    """
    original: Any = getattr(model, METHOD)
    seen: list[ModalityMasks] = []

    def observed(*arguments: Any, **options: Any) -> Any:
        if len(arguments) <= _LABELS_ARGUMENT or arguments[_ATTENTION_ARGUMENT] is None:
            raise UnsupportedModelError(
                f"{type(model).__name__}.{METHOD} must be called with ids, positions, attention mask, cache and labels "
                "in this order and an attention mask given, as in the published code; this version needs an adapter"
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
                f"{type(model).__name__}: the forward reached its decoder layers without {METHOD}; "
                "this version of the code needs an adapter of its own"
            )
        return seen.pop()

    setattr(model, METHOD, observed)
    try:
        yield current
    finally:
        delattr(model, METHOD)  # the class's own method shows again


def _masks(model: nn.Module, result: Any) -> ModalityMasks:
    attention, marks = result[_ATTENTION_RESULT], result[_LABELS_RESULT]
    if not isinstance(marks, Tensor) or not isinstance(attention, Tensor) or marks.shape != attention.shape:
        raise UnsupportedModelError(
            f"{type(model).__name__}.{METHOD} must return an attention mask and labels of one shape, got "
            f"{type(attention).__name__} and {type(marks).__name__}; this version of the code needs an adapter"
        )
    return modality_masks(marks, attention, (IGNORE_INDEX,))


def _check_every_sample(masks: ModalityMasks) -> None:
    for name, mask in (("vision", masks.vision), ("text", masks.text)):
        if not bool(mask.any(dim=1).all()):
            raise ProbeError(
                f"every probe sample must have {name} tokens after the model has placed its images, got none in a "
                "sample; raise tokenizer_model_max_length (images come first and text is cut off), or check the images"
            )
