# SPDX-License-Identifier: Apache-2.0
"""What tiny models of several families share."""

from __future__ import annotations

from typing import Any

# Of families whose processor writes the image down by itself.
PLACED = {"one_image": "puts the image first by itself", "note": "the processor places the image"}


def ids(tok: Any, **tokens: str) -> dict[str, int]:
    """The ids of tokens, under the names of a configuration's fields."""
    return {field: tok.convert_tokens_to_ids(token) for field, token in tokens.items()}
