# SPDX-License-Identifier: Apache-2.0
"""One line for a training script: build probe and adapter for the Trainer's model, attach the callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from llava_integration.common import METHOD
from llava_integration.compatibility import is_llava_next
from llava_integration.llava import LlavaNextAdapter, OriginalLlavaAdapter
from llava_integration.tinyllava import TinyLlavaAdapter, conversation_of
from mir_callback import MIRCallback, PlateauRule, Probe
from mir_callback import distributed as collectives
from mir_callback.config import STOP_RULES
from mir_callback.errors import ConfigError, UnsupportedModelError
from mir_callback.model.decoder import unwrap
from mir_callback.probe.adapters import Adapter, HuggingFaceAdapter
from mir_callback.schedule import Schedule

KNOWN = (
    "haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT (package llava), TinyLLaVA Factory (package tinyllava), "
    "Hugging Face vision-language models (package transformers)"
)


def attach_mir(
    trainer: Any,
    *,
    images: str | Path | None = None,
    texts: str | Path | None = None,
    probe: Probe | str | Path | None = None,
    num_samples: int | None = None,
    every: int | Schedule = 50,
    seed: int | None = None,
    conversation: str | None = None,
    stop: PlateauRule | str | None = None,
    **callback_options: Any,
) -> MIRCallback:
    """Watch MIR in a Trainer, whatever kind of LLaVA its model is.

    Args:
        trainer: a transformers Trainer (LLaVATrainer included), before `train()`.
        images: folder of probe images.
        texts: folder of probe texts.
        probe: a probe, or where one was saved, instead of the two folders.
        num_samples: image + text pairs drawn from the folders, 100 if not given.
        every: optimizer steps between evaluations, or a schedule.
        seed: of the draw, 0 if not given.
        conversation: template of LLaVA, LLaVA-NeXT or TinyLLaVA Factory; by default the run's own, see
            :class:`OriginalLlavaAdapter` and :class:`TinyLlavaAdapter`.
        stop: a stop rule, None to watch only, or as the flags have it "plateau" (``PlateauRule()``),
            "observe" (``PlateauRule(observe_only=True)``) or "none".
        **callback_options: of :class:`MIRCallback`, such as ``batch_size=8``.

    Returns:
        The attached callback.

    Raises:
        ConfigError, ProbeError: something is missing or cannot be read.
        UnsupportedModelError: the model is of no known kind.

    Ranks: collective, with the same arguments; an error on one rank is one on all.
    """
    with collectives.all_or_none():
        adapter = recognise(trainer, conversation)
        samples = draw_or_load(probe, images, texts, num_samples, seed)
        rule = _stop_rule(stop)
    return MIRCallback(samples, every=every, stop=rule, adapter=adapter, **callback_options).attach(trainer)


def draw_or_load(
    probe: Probe | str | Path | None,
    images: str | Path | None,
    texts: str | Path | None,
    num_samples: int | None = None,
    seed: int | None = None,
) -> Probe:
    """The probe that :func:`attach_mir`'s arguments describe; its errors. Ranks: any, each for itself."""
    if (probe is None) == (images is None or texts is None) or (probe is not None and (images or texts)):
        raise ConfigError(
            "either images and texts or probe must be given, got "
            f"images={images!r}, texts={texts!r} and {'a' if probe is not None else 'no'} probe"
        )
    draw = {name: value for name, value in (("num_samples", num_samples), ("seed", seed)) if value is not None}
    if images is not None and texts is not None:
        return Probe.from_folders(images=images, texts=texts, **draw)
    if draw:
        given = " and ".join(f"{name}={value!r}" for name, value in draw.items())
        raise ConfigError(f"{given} must be left out beside a probe, got both; a probe is measured as it is")
    return probe if isinstance(probe, Probe) else Probe.load(str(probe))


def _stop_rule(stop: PlateauRule | str | None) -> PlateauRule | None:
    if not isinstance(stop, str):
        return stop
    if stop not in STOP_RULES:
        raise ConfigError(f"stop must be one of {', '.join(STOP_RULES)}, a rule or None, got {stop!r}")
    return None if stop == "none" else PlateauRule(observe_only=stop == "observe")


def recognise(trainer: Any, conversation: str | None = None) -> Adapter:
    """The adapter for a Trainer's model. Ranks: each for itself."""
    model = getattr(trainer, "model", None)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"trainer must be a transformers Trainer with a model, got {type(trainer).__name__}")
    top = unwrap(model)
    processor = getattr(trainer, "processing_class", None) or getattr(trainer, "tokenizer", None)
    home = type(top).__module__.split(".")[0]
    if home == "llava" and hasattr(top, METHOD):
        family = LlavaNextAdapter if is_llava_next(top) else OriginalLlavaAdapter
        return family(model, processor, conversation=conversation)
    if home == "tinyllava" and hasattr(top, METHOD):
        return TinyLlavaAdapter(model, processor, conversation=conversation or conversation_of(trainer))
    if conversation is not None:
        raise ConfigError(f"conversation must be left out for {type(top).__name__}, got {conversation!r}")
    if hasattr(top, METHOD) or home != "transformers":
        raise UnsupportedModelError(
            f"{type(top).__module__}.{type(top).__name__} is of no kind known here ({KNOWN}); "
            "write an adapter (mir_callback.probe.adapters.Adapter) and give it to MIRCallback(adapter=...)"
        )
    return HuggingFaceAdapter(model, processor)
