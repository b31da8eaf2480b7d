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
from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import Any

from torch import nn

from mir_callback.errors import ConfigError, UnsupportedModelError
from mir_callback.model.decoder import unwrap
from mir_callback.model.modality import AFTER_IMAGE, vision_token_ids
from mir_callback.model.parallelism import refuse_unmeasurable
from mir_callback.probe.encoding import AdaptedBatch, Adapter, LiveMasks, cut_text, require_plain_text
from mir_callback.probe.huggingface import HuggingFaceAdapter, require_processor
from mir_callback.probe.processors import kept_by, load_processor, search_processor
from mir_callback.probe.prompt import check_prompt

# What a family's adapter needs, for those who write one.
__all__ = [
    "AdaptedBatch",
    "Adapter",
    "HuggingFaceAdapter",
    "LiveMasks",
    "cut_text",
    "find_adapter",
    "package_of",
    "register_adapter",
    "require_plain_text",
]

log = logging.getLogger(__name__)

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
    text_positions: str = AFTER_IMAGE,
    vision_ids: str | None = None,
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
        text_positions: which positions count as text, see :class:`mir_callback.config.MIRConfig`.
        vision_ids: ids of vision tokens, likewise.
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
    vision_token_ids(unwrap(model), vision_ids)  # first: a text-only model has no processor that could be missing
    processor = search_processor(model, keeper) if processor is None else processor
    how: dict[str, Any] = {"prompt": prompt, "text_positions": text_positions, "vision_ids": vision_ids}
    return HuggingFaceAdapter(model, processor, **how)


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
