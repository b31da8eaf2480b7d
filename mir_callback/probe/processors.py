# SPDX-License-Identifier: Apache-2.0
"""The processor of a model: as given, wherever the Trainer keeps it, or in the model's own folder."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from typing import Any

from torch import nn

from mir_callback.errors import ConfigError
from mir_callback.model.decoder import unwrap

log = logging.getLogger(__name__)

REMEDY = (
    "Pass processor=AutoProcessor.from_pretrained(...), or --mir_processor FOLDER_OR_NAME, or give the Trainer "
    "processing_class=processor."
)


def handles_images(processor: Any) -> bool:
    """Whether a processor handles both images and text."""
    parts = (getattr(processor, part, None) for part in ("tokenizer", "image_processor"))
    return callable(processor) and all(part is not None for part in parts)


def load_processor(name: str | os.PathLike[str], *, local_only: bool = False) -> Any:
    """The processor in a folder, or of a model on the hub; code that comes with it is not run.

    Args:
        name: the folder, or the model's name.
        local_only: a name is looked up among the files that were downloaded before.

    Raises:
        ConfigError: there is none, or it does not handle both images and text.

    Ranks: any, each for itself.
    """
    from transformers import AutoProcessor

    try:
        found = AutoProcessor.from_pretrained(
            os.path.expanduser(name), local_files_only=local_only, trust_remote_code=False
        )
    except Exception as error:  # of transformers, of the hub, of missing image libraries: any kind
        words = " ".join(str(error).split())
        raise ConfigError(f"Could not load a processor from {name}: {type(error).__name__}: {words:.200}") from error
    if not handles_images(found):
        raise ConfigError(
            f"{name} has a {type(found).__name__}, which does not handle both images and text (image_processor and "
            "tokenizer)."
        )
    return found


def kept_by(trainer: Any) -> Any:
    """The first processor of images and text that a Trainer keeps, else its `processing_class`, or None.

    Looks at `processing_class` (before transformers 4.46 `tokenizer`), then at `processor` of the data collator, of the
    training data, of the model and of the callbacks. One whose tokenizer is not the Trainer's belongs to another model.
    """
    places = list(_places(trainer))
    own = places[0][1] if places else None
    return next((each for _, each in places if handles_images(each) and _agree(own, each)), own)


def search_processor(model: nn.Module, trainer: Any) -> Any:
    """What :func:`kept_by` finds, else the processor in the folder, or the download, that the model was loaded from.

    Raises:
        ConfigError: no processor of images and text was found; says where it was looked for.

    Ranks: any, each for itself.
    """
    places = list(_places(trainer))
    own, kept = places[0][1] if places else None, kept_by(trainer)
    if handles_images(kept):
        if kept is not own:
            _note(next(place for place, each in places if each is kept))
        return kept
    looked = [f"{place} ({_describe(own, each)})" for place, each in places]
    name = getattr(getattr(unwrap(model), "config", None), "_name_or_path", None)
    if name:
        try:
            found = load_processor(name, local_only=True)
        except ConfigError as error:
            looked.append(f"the model's files ({error})")
        else:
            if _agree(own, found):
                _note(name)
                return found
            looked.append(f"the model's files in {name} ({_describe(own, found)})")
    else:
        looked.append("the model's files (its config has no _name_or_path)")
    raise ConfigError(f"Found no processor of images and text. Looked at: {'; '.join(looked)}. {REMEDY}")


@functools.cache
def _note(place: str) -> None:
    log.info("the probe is encoded with the processor of %s; another one: processor=, --mir_processor", place)


def _describe(own: Any, processor: Any) -> str:
    if processor is None:
        return "none"
    name = type(processor).__name__
    is_other = handles_images(processor) and not _agree(own, processor)
    return f"{name}, whose tokenizer is not the Trainer's {type(own).__name__}" if is_other else name


def _agree(own: Any, processor: Any) -> bool:
    """Whether a processor's tokenizer gives the ids of the Trainer's own, which may have tokens more or fewer."""
    if own is None or own is processor or not hasattr(own, "get_vocab"):
        return True
    ours, theirs = own.get_vocab(), processor.tokenizer.get_vocab()
    common = ours.keys() & theirs.keys()
    return len(common) >= 0.9 * min(len(ours), len(theirs)) and all(ours[each] == theirs[each] for each in common)


def _places(trainer: Any) -> Iterator[tuple[str, Any]]:
    """Where a Trainer may keep it, and what is there."""
    if trainer is None:
        return
    own = getattr(trainer, "processing_class", None)
    yield "processing_class", own if own is not None else getattr(trainer, "tokenizer", None)
    for place in ("data_collator", "train_dataset", "model"):
        yield f"{place}.processor", getattr(getattr(trainer, place, None), "processor", None)
    callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", ())
    yield "callbacks", next((each.processor for each in callbacks if handles_images(_processor_of(each))), None)


def _processor_of(callback: Any) -> Any:
    return getattr(callback, "processor", None)
