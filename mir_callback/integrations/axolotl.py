# SPDX-License-Identifier: Apache-2.0
"""MIR in axolotl: a plug-in for its YAML file."""

from __future__ import annotations

import logging
from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel

from mir_callback.errors import ConfigError
from mir_callback.integrations.huggingface import attach_mir
from mir_callback.probe.processors import handles_images


class MIRArgs(BaseModel):
    """The key that the plug-in adds to axolotl's configuration."""

    mir: dict[str, Any] | None = None


class MIRPlugin(BasePlugin):  # type: ignore[misc]  # axolotl is not there when types are checked
    """Attaches MIR to the Trainer that axolotl makes. The key `mir` has the keyword arguments of :func:`attach_mir`.

    Raises:
        ConfigError, ProbeError, UnsupportedModelError: see :func:`attach_mir`; or the YAML file has no `mir`.

    Ranks: axolotl calls it on every rank.

    Example::

        plugins: [mir_callback.integrations.axolotl.MIRPlugin]
        mir: {images: textvqa/val, texts: cnn/stories, every: 50, stop: plateau}
    """

    def get_input_args(self) -> str:
        """The name of :class:`MIRArgs`."""
        return f"{__name__}.{MIRArgs.__name__}"

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Attach MIR; nothing is returned, because axolotl would add it once more."""
        if not cfg.mir:
            raise ConfigError("the YAML file names MIRPlugin but has no `mir:` with the probe: images and texts")
        strategy = getattr(trainer.data_collator, "processing_strategy", None)  # axolotl's collator of images and texts
        for name in logging.root.manager.loggerDict:
            if name.partition(".")[0] == "mir_callback":
                logger = logging.getLogger(name)  # axolotl's filter drops what is no warning and not its own
                logger.filters = [each for each in logger.filters if not type(each).__module__.startswith("axolotl")]
        found = getattr(strategy, "processor", None)
        attach_mir(trainer, **{"processor": found if handles_images(found) else None, **cfg.mir})
        return []
