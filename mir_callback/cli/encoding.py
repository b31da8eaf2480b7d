# SPDX-License-Identifier: Apache-2.0
"""How samples become tokens, as command line arguments of the commands that read models."""

from __future__ import annotations

from argparse import _ArgumentGroup

from mir_callback.model.modality import TEXT_ONLY, TEXT_POSITIONS

ENCODING = ("prompt", "text_positions", "vision_ids", "text_only")  # flags of add_encoding_flags


def add_encoding_flags(group: _ArgumentGroup, prompt: str, default: str) -> None:
    """The options of :class:`MIRConfig` by which samples become tokens; ``prompt`` is the help of that flag."""
    group.add_argument("--prompt", metavar="PROMPT", help=prompt)
    group.add_argument(
        "--text-positions", choices=TEXT_POSITIONS, help=f"positions that count as text (default: {default})"
    )
    group.add_argument("--vision-ids", metavar="IDS", help=f"ids of vision tokens (default: {default})")
    group.add_argument("--text-only", choices=TEXT_ONLY, help=f"samples without an image (default: {default})")
