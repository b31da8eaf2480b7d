# SPDX-License-Identifier: Apache-2.0
"""Samples of several layouts."""

from __future__ import annotations

from typing import Any

from tests.samples import pairs


def documents() -> list[list[Any]]:
    """Pairs, several images, and images among texts."""
    found = pairs(6)
    images, texts = [image for image, _ in found], [text for _, text in found]
    return [
        [images[0], texts[0]],
        [texts[1], images[1], texts[2], images[2], texts[3]],
        [images[3], images[4], texts[4]],
        [texts[0], images[5], texts[5]],
    ]


def mixed(count: int = 9) -> list[list[Any]]:
    """Pairs, two images among texts, and texts alone, in turn."""
    found = []
    for index, (image, text) in enumerate(pairs(count)):
        kinds = ([image, text], ["before " + text, image, "between", image.rotate(90), text], ["alone: " + text])
        found.append(kinds[index % 3])
    return found
