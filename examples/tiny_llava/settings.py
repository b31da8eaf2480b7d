# SPDX-License-Identifier: Apache-2.0
"""Sizes and durations of what is prepared before pre-training; together they key the cache."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How the language model, the vision tower and the probe are made.

    Attributes:
        seed: of every random draw.
        cell: width in pixels of one digit in a scene.
        patch: width in pixels of one patch of the vision tower.
        probe_samples: held-out scenes and held-out pieces of prose.
        vocab: pieces of the tokenizer.
        hidden: width of the language model.
        layers: its decoder layers.
        heads: its attention heads.
        intermediate: width of its feed-forward part.
        language_steps: its training steps.
        prose_batch: rows of prose in each of them.
        prose_tokens: tokens of such a row.
        caption_batch: rasters with captions in each of them.
        language_rate: its highest learning rate.
        vision_hidden: width of the vision tower.
        vision_layers: its encoder layers.
        vision_heads: its attention heads.
        vision_intermediate: width of its feed-forward part.
        vision_scenes: different scenes it is trained with.
        vision_steps: its training steps.
        vision_batch: scenes in each of them.
        vision_rate: its highest learning rate.
        massive_dimensions: features that lie far off centre, see `vision.add_massive_dimensions`.
        massive_value: how far.
    """

    seed: int = 0

    cell: int = 16
    patch: int = 8
    probe_samples: int = 100

    vocab: int = 1024
    hidden: int = 128
    layers: int = 6
    heads: int = 4
    intermediate: int = 352
    language_steps: int = 400
    prose_batch: int = 12
    prose_tokens: int = 96
    caption_batch: int = 8
    language_rate: float = 3e-3

    vision_hidden: int = 64
    vision_layers: int = 4
    vision_heads: int = 4
    vision_intermediate: int = 192
    vision_scenes: int = 8000
    vision_steps: int = 1800
    vision_batch: int = 64
    vision_rate: float = 2e-3
    massive_dimensions: tuple[int, ...] = (11, 47)
    massive_value: float = 300.0

    @property
    def side(self) -> int:
        """Width and height of a scene in pixels."""
        return 2 * self.cell

    @property
    def grid(self) -> int:
        """Patches along one side of a scene."""
        return self.side // self.patch
