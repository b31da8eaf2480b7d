# SPDX-License-Identifier: Apache-2.0
"""Samples from Hugging Face datasets. The package `datasets` is not needed to import this, only to have a dataset."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mir_callback.errors import ConfigError, ProbeError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
TEXT_SUFFIXES = frozenset({".txt", ".md", ".story"})
IMAGE_PLACEHOLDER = "<image>"

T = TypeVar("T")


@dataclass(frozen=True)
class LlavaRecord:
    """The usable part of one LLaVA-format record: a name for messages, its one image path, its text."""

    name: str
    image: str
    text: str


def image_files(folder: Path) -> list[Path]:
    """Image files below ``folder``, ordered by relative path."""
    return _files(folder, IMAGE_SUFFIXES, "images")


def text_files(folder: Path) -> list[Path]:
    """Text files below ``folder``, ordered by relative path."""
    return _files(folder, TEXT_SUFFIXES, "texts")


def draw(items: list[T], num_samples: int, seed: int, field: str, origin: str | Path) -> list[T]:
    """Choose ``num_samples`` different items, the same ones for the same seed and items.

    Raises:
        ProbeError: fewer items than asked.
    """
    if len(items) < num_samples:
        raise ProbeError(
            f"num_samples must not exceed what {field} holds, got num_samples={num_samples} and {len(items)} usable "
            f"items in {origin}; lower num_samples or add more"
        )
    return random.Random(seed).sample(items, num_samples)


def read_text(path: Path) -> str:
    """A text file's content, stripped; of a `.story` file the article without its @highlight sections."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(
            f"probe text {path} must be readable UTF-8, got {type(error).__name__}: {error}; convert or remove it"
        ) from error
    if path.suffix.lower() == ".story":
        text = text.partition("@highlight")[0]
    return text.strip()


def read_image_bytes(path: Path, name: str) -> bytes:
    """The bytes of an image file a record points to."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ProbeError(
            f"probe image of {name} must exist at {path}, got {type(error).__name__}; check the images folder"
        ) from error


def llava_records(json_file: Path) -> list[LlavaRecord]:
    """Records with exactly one image, in file order.

    Raises:
        ProbeError: the file is missing, is no JSON list of records, or a record lacks `conversations`.
    """
    try:
        data = json.loads(json_file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ProbeError(
            f"json_file must be a readable LLaVA-format JSON list, got {json_file}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(data, list):
        raise ProbeError(
            f"json_file {json_file} must hold a list of records, got {type(data).__name__}; "
            'expected [{"id": ..., "image": ..., "conversations": [...]}, ...]'
        )
    records = [_record(entry, index, json_file) for index, entry in enumerate(data)]
    return [record for record in records if record is not None]


def question_images(questions: Path, images: Path) -> list[Path]:
    """The image files that a TextVQA question file asks about, each once, in the order of the file.

    Args:
        questions: TextVQA's own JSON (`data`: a list with `image_id`), or JSON lines with `image` as LLaVA's evaluation
            has them.
        images: the folder with the images; `image_id` stands for a `.jpg` there.

    Raises:
        ProbeError: not such a file, or a question without an image.
    """
    names = [_question_image(entry, index, questions) for index, entry in enumerate(_questions(questions))]
    return [images / name for name in dict.fromkeys(names)]


def _questions(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        data = json.loads(text)
    except (OSError, ValueError) as error:
        raise ProbeError(
            f"questions must be a readable TextVQA question file (.json, or .jsonl with one question a line), got "
            f"{path}: {type(error).__name__}: {error}"
        ) from error
    questions = data.get("data") if isinstance(data, dict) else data
    if not isinstance(questions, list):
        raise ProbeError(
            f'questions {path} must hold a list of questions, as such or under "data", got {type(data).__name__}; '
            "take TextVQA's own JSON or JSON lines"
        )
    return questions


def _question_image(entry: Any, index: int, path: Path) -> str:
    if isinstance(entry, dict):
        if isinstance(entry.get("image"), str):
            return str(entry["image"])
        if isinstance(entry.get("image_id"), str):
            return f"{entry['image_id']}.jpg"
    raise ProbeError(
        f"question {index} of {path.name} must name its image in `image` or `image_id`, got {entry!r:.80}; "
        "repair or remove that question"
    )


def _record(entry: Any, index: int, json_file: Path) -> LlavaRecord | None:
    name = f"record {entry.get('id', index) if isinstance(entry, dict) else index} of {json_file.name}"
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns):
        raise ProbeError(
            f'{name}: conversations must be a list of {{"from": ..., "value": text}}, '
            f"got {turns!r:.80}; repair or remove that record"
        )
    image = entry.get("image")
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if not isinstance(image, str):
        return None
    spoken = (turn["value"].replace(IMAGE_PLACEHOLDER, "").strip() for turn in turns)
    return LlavaRecord(name, image, "\n".join(text for text in spoken if text))


def _files(folder: Path, suffixes: frozenset[str], field: str) -> list[Path]:
    if not folder.is_dir():
        raise ProbeError(f"{field} must be an existing folder, got {folder}; check the path")
    found = (Path(root) / name for root, _, names in os.walk(folder, followlinks=True) for name in names)
    files = [path for path in found if path.suffix.lower() in suffixes and path.is_file()]
    if not files:
        raise ProbeError(
            f"{field} must hold files ending in {', '.join(sorted(suffixes))}, got none in {folder}; "
            "check the path or convert the files"
        )
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


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
