# SPDX-License-Identifier: Apache-2.0
"""Samples of several layouts."""

from __future__ import annotations

from typing import Any

from tests.samples import pairs


def mixed(count: int = 9) -> list[list[Any]]:
    """Pairs, two images among texts, and texts alone, in turn."""
    found = []
    for index, (image, text) in enumerate(pairs(count)):
        kinds = ([image, text], ["before " + text, image, "between", image.rotate(90), text], ["alone: " + text])
        found.append(kinds[index % 3])
    return found
