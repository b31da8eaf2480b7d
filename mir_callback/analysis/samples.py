# SPDX-License-Identifier: Apache-2.0
"""Samples of a probe for people: all images of one in one picture, and its text."""

from __future__ import annotations

import math

from PIL import Image, ImageOps

from mir_callback.probe.sample import Sample

_PAPER = "#ffffff"
_GAP = 2  # pixels between images


def draw_images(sample: Sample, size: tuple[int, int]) -> Image.Image | None:
    """The images of a sample, and the frames of its videos, in a grid of at most ``size``; None if it has none.

    They are opened one by one. Ranks: pure.
    """
    count = sample.num_images
    if count == 1:
        return ImageOps.contain(next(sample.open_images()), size)
    if count == 0:
        return None
    across = math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    cell = max(1, (size[0] + _GAP) // across - _GAP), max(1, (size[1] + _GAP) // down - _GAP)
    grid = Image.new("RGB", size, _PAPER)
    for index, image in enumerate(sample.open_images()):
        small = ImageOps.contain(image, cell)
        left, top = index % across * (cell[0] + _GAP), index // across * (cell[1] + _GAP)
        grid.paste(small, (left + (cell[0] - small.width) // 2, top + (cell[1] - small.height) // 2))
    return grid


def write_out(sample: Sample) -> str:
    """The text of a sample on one line; of one that is no pair with its images in place, such as [image].

    Ranks: pure.

    Example:
        >>> from mir_callback.probe.sample import Picture
        >>> write_out(Sample("a", ("before", Picture(b""), "and after")))
        'before [image] and after'
    """
    if sample.is_pair:
        return " ".join(sample.text.split())
    words = (part if kind == "text" else f"[{kind}]" for part, kind in zip(sample.parts, sample.kinds, strict=True))
    return " ".join(" ".join(map(str, words)).split())
