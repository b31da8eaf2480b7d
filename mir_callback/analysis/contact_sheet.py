# SPDX-License-Identifier: Apache-2.0
"""A contact sheet of a probe: every image with the beginning of its text, to see at a glance what is measured."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from mir_callback.errors import ConfigError
from mir_callback.probe.batches import TokenCounts
from mir_callback.probe.probe import Probe

_PICTURE = (224, 168)
_MARGIN = 12
_FONT_SIZE = 12
_LINE = 16
_TEXT_LINES = 4
_CHARACTERS = 36  # of a line of text in the width of a picture
_CELL = (_PICTURE[0] + 2 * _MARGIN, _PICTURE[1] + (_TEXT_LINES + 2) * _LINE + 2 * _MARGIN)
_LEAST_WIDTH = 560  # of the heading
_INK, _FAINT, _PAPER = "#222222", "#777777", "#ffffff"


def draw_sheet(
    probe: Probe, path: str | Path, counts: TokenCounts | None = None, *, columns: int | None = None
) -> Path:
    """Draw every sample of a probe into one picture.

    Args:
        probe: the samples.
        path: image file to write, such as `probe.png`; the suffix chooses the format; parents are created.
        counts: token counts to write below the images.
        columns: samples side by side; by default chosen for a sheet a little wider than high.

    Returns:
        The path written.

    Raises:
        ConfigError: the suffix is of no image format, or the file cannot be written.

    Ranks: rank 0 only.
    """
    path = Path(os.path.expanduser(path))
    check_sheet_path(path)
    across = min(len(probe), columns or max(4, round((len(probe) * 1.6) ** 0.5)))
    down = -(-len(probe) // across)
    title = 3 * _LINE
    sheet = Image.new("RGB", (max(across * _CELL[0], _LEAST_WIDTH), down * _CELL[1] + title), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    heading = f"probe {probe.fingerprint}: {len(probe)} samples, texts up to {probe.max_text_tokens} tokens"
    pen.text((_MARGIN, _LINE), heading, fill=_INK, font=ImageFont.load_default(_FONT_SIZE + 4))
    for index, sample in enumerate(probe.samples):
        left, top = index % across * _CELL[0] + _MARGIN, index // across * _CELL[1] + title
        picture = ImageOps.contain(sample.open_image(), _PICTURE)
        sheet.paste(picture, (left + (_PICTURE[0] - picture.width) // 2, top + _PICTURE[1] - picture.height))
        top += _PICTURE[1] + _LINE // 2
        for faint, line in enumerate([_caption(index, counts), *_shortened(sample.name, 1), *_lines(sample.text)]):
            pen.text((left, top), line, fill=_FAINT if faint < 2 else _INK, font=font)
            top += _LINE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except OSError as error:
        raise ConfigError(
            f"the sheet must have a place to be written to, got {path}: {type(error).__name__}: {error.strerror}"
        ) from error
    return path


def check_sheet_path(path: str | Path) -> None:
    """Raise ConfigError unless ``path`` ends as an image file does. Ranks: pure."""
    if Path(path).suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"the sheet must be an image file, got {path}; use a name that ends in .png")


def _caption(index: int, counts: TokenCounts | None) -> str:
    if counts is None:
        return f"{index}"
    vision = "" if counts.vision is None else f"{counts.vision[index]} vision, "
    return f"{index}: {vision}{counts.text[index]} text tokens"


def _lines(text: str) -> Sequence[str]:
    return _shortened(" ".join(text.split()), _TEXT_LINES)


def _shortened(text: str, lines: int) -> list[str]:
    return textwrap.wrap(text, _CHARACTERS, max_lines=lines, placeholder=" ...") or [""]
