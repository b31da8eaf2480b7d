# SPDX-License-Identifier: Apache-2.0
"""Samples from Hugging Face datasets. The package `datasets` is not needed to import this, only to have a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mir_callback.errors import ConfigError, ProbeError
from mir_callback.probe.sources import draw, read_image_bytes


def open_dataset(path: str, split: str) -> Any:
    """One split of a dataset: a folder that `Dataset.save_to_disk` wrote, or what `datasets.load_dataset` finds.

    Raises:
        ConfigError: the package is not installed.
        ProbeError: there is no such dataset or split.

    Ranks: any.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"dataset {path} needs the package datasets, which is not installed; pip install datasets"
        ) from error
    folder = Path(path)
    try:
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(path)[split]
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(path)
        return datasets.load_dataset(path, split=split)
    except Exception as error:  # a hub client, a builder or a file system may raise anything
        raise ProbeError(
            f"dataset {path}, split {split}, must be loadable, got {type(error).__name__}: {error}; check both names"
        ) from error


def image_rows(dataset: Any, column: str, num_samples: int, seed: int) -> list[tuple[str, bytes]]:
    """Drawn rows of an image column as (name for messages, bytes of the image file as stored)."""
    stored = _column(dataset, column, "image_column")
    feature = dataset.features[column]
    if type(feature).__name__ != "Image":
        raise ProbeError(
            f"image_column must name a column with the Image feature, got {column!r} of type {feature}; "
            f"cast it: dataset.cast_column({column!r}, datasets.Image())"
        )
    undecoded = stored.cast_column(column, type(feature)(decode=False))
    drawn = _drawn(dataset, num_samples, seed)
    return [(f"row {row}", _image_bytes(undecoded[row][column], f"row {row}")) for row in drawn]


def text_rows(dataset: Any, column: str, num_samples: int, seed: int) -> list[tuple[str, str]]:
    """Drawn rows of a text column as (name for messages, text)."""
    stored = _column(dataset, column, "text_column")
    rows = []
    for row in _drawn(dataset, num_samples, seed):
        text = stored[row][column]
        if not isinstance(text, str):
            raise ProbeError(
                f"text_column must hold strings, got {type(text).__name__} in row {row} of {column!r}; "
                "name another column"
            )
        rows.append((f"row {row}", text.strip()))
    return rows


def _column(dataset: Any, column: str, field: str) -> Any:
    # Several splits have a dict of column names, a streamed one has no length.
    if not isinstance(getattr(dataset, "column_names", None), list) or not hasattr(dataset, "__len__"):
        raise ProbeError(
            f"dataset must be one split of a Hugging Face dataset that is not streamed, got {type(dataset).__name__}; "
            'use datasets.load_dataset(name, split="validation")'
        )
    if column not in dataset.column_names:
        raise ProbeError(
            f"{field} must be one of {', '.join(dataset.column_names)}, got {column!r}; name the right one"
        )
    return dataset.select_columns([column])


def _drawn(dataset: Any, num_samples: int, seed: int) -> list[int]:
    return draw(list(range(len(dataset))), num_samples, seed, "dataset", f"a dataset of {len(dataset)} rows")


def _image_bytes(stored: Any, name: str) -> bytes:
    if stored is None:
        raise ProbeError(f"probe image of {name} must be there, got none; drop such rows with dataset.filter")
    if stored["bytes"] is not None:
        return bytes(stored["bytes"])
    return read_image_bytes(Path(stored["path"]), name)
