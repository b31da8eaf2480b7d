# SPDX-License-Identifier: Apache-2.0
"""English prose that ships with Python: the language reference behind ``help()``."""

from __future__ import annotations

import re
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

SHORTEST, LONGEST = 120, 200  # characters of a held-out piece: roughly 35 to 60 tokens


def paragraphs() -> list[str]:
    """All distinct paragraphs that read as prose: no grammar rules, tables or code."""
    blocks = (block for topic in sorted(topics) for block in re.split(r"\n\s*\n", topics[topic]))
    joined = (re.sub(r"(\s|\*\*)+", " ", block).strip(" -*") for block in blocks)
    return list(dict.fromkeys(text for text in joined if _reads_as_prose(text)))


def split_prose(num_held_out: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Return (training paragraphs, held-out pieces); no held-out piece is seen in training."""
    texts = paragraphs()
    suitable = [index for index, text in enumerate(texts) if len(text) >= SHORTEST]
    if len(suitable) < num_held_out:
        raise ValueError(f"num_held_out must be at most {len(suitable)} (paragraphs long enough), got {num_held_out}")
    chosen = set(np.random.default_rng(seed).choice(suitable, size=num_held_out, replace=False).tolist())
    training = [text for index, text in enumerate(texts) if index not in chosen]
    return training, [_shortened(texts[index]) for index in sorted(chosen)]


def write_texts(pieces: list[str], folder: Path) -> None:
    """Write each piece as a .txt file."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, piece in enumerate(pieces):
        (folder / f"piece_{index:03d}.txt").write_text(piece + "\n", encoding="utf-8")


def _reads_as_prose(text: str) -> bool:
    letters = sum(character.isalpha() or character.isspace() for character in text)
    return len(text) >= 80 and text[0].isupper() and text[-1] in ".:" and letters / len(text) > 0.87


def _shortened(text: str) -> str:
    """Cut at the last word boundary before the longest length."""
    return text if len(text) <= LONGEST else text[:LONGEST].rsplit(" ", 1)[0]
