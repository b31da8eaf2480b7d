# SPDX-License-Identifier: Apache-2.0
"""Images and texts for tests, drawn from a seed; and a pickle that runs code."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mir_callback.probe.sample import Picture, Sample

SENTENCE = "the model reads an image and then a text about something else "


class Evil:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (self._folder,)


def pairs(count: int, seed: int = 0) -> list[tuple[Image.Image, str]]:
    """Images of several sizes and texts of several lengths."""
    rng = np.random.default_rng(seed)
    return [
        (
            Image.fromarray(rng.integers(0, 255, (40 + 8 * (i % 3), 48, 3), dtype=np.uint8)),
            SENTENCE[: 20 + 7 * (i % 4)] + f"number {rng.integers(1000)}",
        )
        for i in range(count)
    ]


def image_of(sample: Sample) -> bytes:
    """The bytes of the image of a pair."""
    picture = sample.parts[0]
    assert isinstance(picture, Picture)
    return picture.data


def write_folders(root: Path, count: int, seed: int = 0) -> tuple[Path, Path]:
    """The pairs as an image folder and a text folder, spread over subfolders."""
    images, texts = root / "images", root / "texts"
    for index, (image, text) in enumerate(pairs(count, seed)):
        for folder in (images, texts):
            (folder / f"part{index % 2}").mkdir(parents=True, exist_ok=True)
        image.save(images / f"part{index % 2}" / f"{index:03d}.png")
        (texts / f"part{index % 2}" / f"{index:03d}.txt").write_text(text, encoding="utf-8")
    return images, texts


def write_llava_json(root: Path, count: int) -> tuple[Path, Path]:
    """The pairs as a LLaVA-format JSON file with its image folder."""
    images, _ = write_folders(root, count)
    records = [
        {
            "id": f"{index}",
            "image": f"part{index % 2}/{index:03d}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nDescribe the image concisely."},
                {"from": "gpt", "value": f"Scene {index}."},
            ],
        }
        for index in range(count)
    ]
    path = root / "data.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path, images
