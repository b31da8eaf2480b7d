# SPDX-License-Identifier: Apache-2.0
"""What a model of the package `llava` must fulfil to be observed, and what to say where it or its surroundings do not.

Measured with llava-torch 1.2.2.post1: its training script runs with transformers 4.36.2 to 4.51.3 (and the accelerate
of their time); 4.52.4 calls its Trainer in another way, 4.53.3 and later lack what it imports, and under 5.23.0 its
vision tower may return other features.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import tokenizers
import transformers
from torch import nn

from llava_integration.common import METHOD
from mir_callback.errors import UnsupportedModelError

TESTED = "transformers==4.37.2 tokenizers==0.15.2 accelerate==0.21.0"
WORKING_FROM, BROKEN_FROM = (4, 36), (4, 52)


def require_observable(model: nn.Module) -> None:
    """Refuse a model whose forward would fail, or would place no images.

    Args:
        model: the unwrapped model.

    Raises:
        UnsupportedModelError: no image expansion, no vision tower or one without weights, or a forward that does not
            fit the expansion.
    """
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
    """Whether an unwrapped model with METHOD is LLaVA-NeXT's and not the original LLaVA's. Ranks: pure."""
    return "modalities" in inspect.signature(getattr(model, METHOD)).parameters


@contextmanager
def tower_states_checked(model: nn.Module) -> Iterator[None]:
    """While open, refuse a forward whose vision tower returns more hidden states than it has layers.

    transformers 5 hooks a tower that LLaVA has loaded by itself a second time once somebody asks for the language
    model's hidden states; from then on the tower returns every state twice, and LLaVA's `select_layer` counted from
    the end takes another layer without a word.

    Raises (inside the forward):
        UnsupportedModelError: the tower returned too many states.
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
    return (
        f"{llava_version()} runs here with transformers {transformers.__version__} and tokenizers "
        f"{tokenizers.__version__}; it works with transformers 4.36 to 4.51, tested with: pip install {TESTED}"
    )


def llava_version() -> str:
    """Name and version of the distribution that the package llava came in."""
    for name in metadata.packages_distributions().get("llava", []):
        return f"{name} {metadata.version(name)}"
    return "the package llava"


def explain(error: BaseException) -> str | None:
    """What to say beside a script's failure if llava met a transformers it does not work with, else None."""
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    if WORKING_FROM <= (major, minor) < BROKEN_FROM:
        return None
    frame = error.__traceback__
    while frame is not None:
        if str(frame.tb_frame.f_globals.get("__name__")).split(".")[0] == "llava":
            return f"{type(error).__name__} while llava was at work: {surroundings()}"
        frame = frame.tb_next
    return None
