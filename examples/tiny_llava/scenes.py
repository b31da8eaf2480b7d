# SPDX-License-Identifier: Apache-2.0
"""Scenes of four real handwritten digits (scikit-learn's bundled scans) with captions that say what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import Dataset

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CAPTIONS = (
    "The digits {0} and {1} stand above {2} and {3}.",
    "Four digits: {0} and {1} in the upper row, {2} and {3} below.",
    "The upper row reads {0}, {1} and the lower row reads {2}, {3}.",
)
TRAINING_SCANS = 1500  # the remaining 297 of the 1797 scans appear in no training scene

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Scene:
    """One picture, the digits in it (upper left, upper right, lower left, lower right) and a true caption."""

    image: Image.Image
    digits: tuple[int, ...]
    caption: str


def caption_for(digits: Sequence[int], rng: np.random.Generator) -> str:
    """Describe four digits with one of the caption patterns, drawn by ``rng``."""
    return CAPTIONS[rng.integers(len(CAPTIONS))].format(*(DIGIT_WORDS[digit] for digit in digits))


def raster_words(digits: Sequence[int], grid: int) -> list[str]:
    """Name the digit under each patch, row by row: what an ideally readable image would say to a language model."""
    half = grid // 2
    return [DIGIT_WORDS[digits[2 * (row // half) + column // half]] for row in range(grid) for column in range(grid)]


class Scenes(Dataset[dict[str, object]]):
    """Scenes by index: the same seed and index always give the same scene, on every rank."""

    def __init__(self, size: int, split: Split, seed: int, cell: int) -> None:
        scans = load_digits()
        order = np.random.default_rng(0).permutation(len(scans.target))  # the data set's last part has other writers
        chosen = order[:TRAINING_SCANS] if split == "train" else order[TRAINING_SCANS:]
        self.scans = [_enlarged(scan, cell) for scan in scans.images[chosen]]
        self.labels = scans.target[chosen]
        self.size = size
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def scene(self, index: int) -> Scene:
        """Compose the scene with this index."""
        rng = np.random.default_rng((self.seed, index))
        picks = rng.integers(len(self.scans), size=4)
        ink, paper = rng.uniform(0.6, 1.0), rng.uniform(0.0, 0.2)
        cells = [_moved(self.scans[i], rng) for i in picks]
        strokes = np.vstack([np.hstack(cells[:2]), np.hstack(cells[2:])]) / 255
        grey = (255 * (paper + (ink - paper) * strokes)).astype(np.uint8)
        digits = tuple(int(self.labels[i]) for i in picks)
        return Scene(Image.fromarray(grey).convert("RGB"), digits, caption_for(digits, rng))

    def __getitem__(self, index: int) -> dict[str, object]:
        scene = self.scene(index)
        return {"image": scene.image, "caption": scene.caption}


def write_images(scenes: Scenes, folder: Path) -> None:
    """Write every scene as a PNG file, as a folder of photographs would lie on disk."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(len(scenes)):
        scenes.scene(index).image.save(folder / f"scene_{index:03d}.png")


def _enlarged(scan: np.ndarray, cell: int) -> Image.Image:
    """Turn an 8 x 8 scan with values 0..16 into a ``cell`` x ``cell`` grey image."""
    pixels = Image.fromarray((scan * (255 / 16)).astype(np.uint8))
    return pixels.resize((cell, cell), Image.Resampling.BICUBIC)


def _moved(digit: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """Turn a digit by up to 12 degrees and shift it by up to a pixel, so that no two drawings are the same."""
    shift = (int(rng.integers(-1, 2)), int(rng.integers(-1, 2)))
    return np.asarray(digit.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, translate=shift))
