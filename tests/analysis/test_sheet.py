# SPDX-License-Identifier: Apache-2.0
"""A contact sheet shows every sample."""

import numpy as np
import pytest
from PIL import Image

from mir_callback import Probe
from mir_callback.analysis.pictures import draw_sheet
from mir_callback.errors import ConfigError
from mir_callback.probe.batches import TokenCounts

COLOURS = [(200, 30 * i, 255 - 30 * i) for i in range(7)]


@pytest.fixture(scope="module")
def probe():
    sizes = [(64, 20), (20, 64), (300, 300), (1, 1), (5, 500), (640, 480), (64, 64)]
    return Probe.from_pairs(
        [(Image.new("RGB", size, colour), f"text {size}") for size, colour in zip(sizes, COLOURS, strict=True)]
    )


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_every_image_is_on_the_sheet(probe, tmp_path):
    sheet = pixels(draw_sheet(probe, tmp_path / "deeper" / "sheet.png")).reshape(-1, 3)
    for colour in COLOURS:
        assert (sheet == colour).all(axis=1).sum() > 100, colour


def test_token_counts_and_texts_are_written(probe, tmp_path):
    plain = pixels(draw_sheet(probe, tmp_path / "a.png"))
    counted = pixels(draw_sheet(probe, tmp_path / "b.png", TokenCounts([576] * 7, list(range(7)), "x")))
    other = Probe.from_pairs([(sample.open_image(), "words") for sample in probe.samples])
    assert plain.shape == counted.shape
    assert not np.array_equal(plain, counted)
    assert not np.array_equal(plain, pixels(draw_sheet(other, tmp_path / "c.png")))


def test_columns_can_be_chosen(probe, tmp_path):
    narrow = pixels(draw_sheet(probe, tmp_path / "a.png", columns=1))
    wide = pixels(draw_sheet(probe, tmp_path / "b.png", columns=7))
    assert narrow.shape[0] > 3 * narrow.shape[1]
    assert wide.shape[1] > 4 * wide.shape[0]


def test_error_names_the_file_when_it_is_no_image_file(probe, tmp_path):
    with pytest.raises(ConfigError, match="the sheet must be an image file, got .*sheet.txt"):
        draw_sheet(probe, tmp_path / "sheet.txt")
