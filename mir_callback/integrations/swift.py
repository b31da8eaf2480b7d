# SPDX-License-Identifier: Apache-2.0
"""MIR in ms-swift: a plug-in for `swift sft`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from mir_callback import distributed
from mir_callback.config import MIRConfig
from mir_callback.integrations.huggingface import MIRCallback
from mir_callback.probe.probe import Probe, ProbeSource


def register_mir(
    probe: Probe | str | Path | None = None,
    *,
    images: str | Path | None = None,
    texts: str | Path | None = None,
    num_samples: int | None = None,
    seed: int | None = None,
    **options: Any,
) -> None:
    """Make `--callbacks mir` measure MIR. Call it in a file that swift gets as `--external_plugins`.

    Args:
        probe: a probe, or the path of a saved one; or instead
        images: a folder of probe images, and
        texts: a folder of probe texts.
        num_samples: image and text pairs drawn from the folders, 100 by default.
        seed: of the draw, 0 by default.
        **options: of :class:`MIRConfig`.

    Raises:
        ConfigError: an option is unknown or out of range.

    Ranks: every rank; swift imports the file on each.

    Example:
        ```
        # mir_plugin.py; then: swift sft --external_plugins mir_plugin.py --callbacks mir ITS ARGUMENTS
        from mir_callback.integrations.swift import register_mir

        register_mir(images="textvqa/val", texts="cnn/stories", every=50, stop="plateau")
        ```
    """
    from swift.callbacks import callbacks_map

    MIRConfig.from_options(options)
    source = ProbeSource(probe=probe, images=images, texts=texts, num_samples=num_samples, seed=seed)
    callbacks_map["mir"] = lambda args, trainer: MIRSwiftCallback(trainer, source, options)


class MIRSwiftCallback(MIRCallback):
    """Attaches itself once swift's Trainer, which makes its callbacks first, is complete."""

    def __init__(self, trainer: Any, source: ProbeSource, options: dict[str, Any]) -> None:
        with distributed.fail_together():
            probe = source.load()
        super().__init__(probe, processor=trainer.template.processor, **options)
        self._made_for = trainer

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Attach, behind all other callbacks: swift's progress bar can't log before it has begun."""
        handler = self._made_for.callback_handler
        handler.callbacks = [*(each for each in handler.callbacks if each is not self), self]  # who iterates, goes on
        self.attach(self._made_for)
