# SPDX-License-Identifier: Apache-2.0
"""What LLaVA saves of a run that trains its projector only: the projector, in the files stage 2 reads."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from mir_callback import collectives

PROJECTOR_FILE = "mm_projector.bin"
_GATHER = "get_mm_adapter_state_maybe_zero_3"


def projector_saver(trainer: Any) -> ProjectorSaver | None:
    """A saver if the Trainer's own `save_model` writes no weights, because only the projector trains; else None.

    Ranks: all.
    """
    arguments = getattr(trainer, "args", None)
    parts = (getattr(arguments, "mm_tunable_parts", None) or "").split(",")  # LLaVA-NeXT's
    alone = getattr(arguments, "tune_mm_mlp_adapter", False) or parts in (["mm_mlp_adapter"], ["mm_vision_resampler"])
    return ProjectorSaver(trainer) if alone and _gather_of(trainer) is not None else None


class ProjectorSaver:
    """`mm_projector.bin` and the configuration, as LLaVA's own stage-1 checkpoints hold them.

    Weights are collected by LLaVA's own function, which gathers one at a time under ZeRO-3.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def __call__(self, folder: Path) -> None:
        """See :class:`mir_callback.training.checkpoint.WeightSaver`."""
        names = ["mm_projector", "vision_resampler"]
        if getattr(self._trainer.args, "use_im_start_end", False):
            names += ["embed_tokens", "embed_in"]
        weights = _gather_of(self._trainer)(self._trainer.model.named_parameters(), names)
        if collectives.is_main():
            self._trainer.model.config.save_pretrained(str(folder))
            torch.save(weights, os.path.join(folder, PROJECTOR_FILE))

    def notice(self) -> str | None:
        """See :class:`mir_callback.training.checkpoint.WeightSaver`."""
        return f"only the projector trains, so only {PROJECTOR_FILE} and the configuration are kept"


def _gather_of(trainer: Any) -> Any:
    """The function of LLaVA's trainer module, whichever subclass of its Trainer this is."""
    for cls in type(trainer).__mro__:
        found = getattr(sys.modules.get(cls.__module__), _GATHER, None)
        if found is not None:
            return found
    return None
