# SPDX-License-Identifier: Apache-2.0
"""Where images and texts are drawn from: folders, TextVQA's files, columns of Hugging Face datasets.

Images are (name for messages, bytes of the image file as stored), texts are (name, text). A draw depends on the seed
and on what there is to draw from, and on nothing else.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from mir_callback.errors import ConfigError, ProbeError
from mir_callback.fs import require_file

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
TEXT_SUFFIXES = frozenset({".txt", ".md", ".story"})

T = TypeVar("T")


def as_path(given: str | Path, name: str) -> Path:
    """A path with `~` expanded. Unlike pathlib's own expansion it accepts `~nobody`."""
    if not isinstance(given, (str, Path)):
        raise ProbeError(f"{name} must be a path, got {given!r:.80} of type {type(given).__name__}.")
    return Path(os.path.expanduser(given))


def draw(items: list[T], num_samples: int, seed: int, field: str, origin: str | Path) -> list[T]:
    """Draw ``num_samples`` items without replacement; ProbeError if there are fewer."""
    require_enough(len(items), num_samples, field, origin)
    return random.Random(seed).sample(items, num_samples)


def require_enough(count: int, num_samples: int, field: str, origin: str | Path) -> None:
    """ProbeError if there are fewer items than samples to draw."""
    if count < num_samples:
        raise ProbeError(
            f"num_samples={num_samples}, but {field} has only {count} usable items ({origin}). Lower num_samples or "
            "add more."
        )


def images_of_folder(folder: Path, num_samples: int, seed: int) -> list[tuple[str, bytes]]:
    """Image files of a folder, searched recursively."""
    files = draw(_files(folder, IMAGE_SUFFIXES, "images"), num_samples, seed, "images", folder)
    return [(name, image_bytes(folder / name, name)) for name in files]


def texts_of_folder(folder: Path, num_samples: int, seed: int) -> list[tuple[str, str]]:
    """Text files of a folder, searched recursively; of `.story` files the article without its @highlight sections."""
    files = draw(_files(folder, TEXT_SUFFIXES, "texts"), num_samples, seed, "texts", folder)
    return [(name, _read_text(folder / name)) for name in files]


def _files(folder: Path, suffixes: frozenset[str], field: str) -> list[str]:
    """Relative names of the files in a folder and its subfolders, sorted."""
    if not folder.is_dir():
        raise ProbeError(f"There is no folder {folder} ({field}). Check the path.")
    found = (Path(root) / name for root, _, names in os.walk(folder, followlinks=True) for name in names)
    files = [path for path in found if path.suffix.lower() in suffixes and path.is_file()]
    if not files:
        raise ProbeError(
            f"The folder {folder} ({field}) has no files that end in {', '.join(sorted(suffixes))}. Check the path or "
            "convert the files."
        )
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ProbeError(
            f"Could not read the text {path} as UTF-8: {type(error).__name__}: {error}. Convert or remove it."
        ) from error
    return (text.partition("@highlight")[0] if path.suffix.lower() == ".story" else text).strip()


def image_bytes(path: Path, name: str) -> bytes:
    """The bytes of an image file; ProbeError, which says what it is the image of, if it cannot be read."""
    try:
        require_file(path)
        return path.read_bytes()
    except (OSError, ValueError) as error:  # a null character in a name is a ValueError
        raise ProbeError(
            f"Could not read the image of {name} from {path}: {type(error).__name__}. Check the images folder."
        ) from error


def images_of_questions(questions: Path, images: Path, num_samples: int, seed: int) -> list[tuple[str, bytes]]:
    """Images that a TextVQA question file asks about, each once.

    The file is TextVQA's own JSON (`data`: a list with `image_id`, for a `.jpg`), or JSON lines with `image`, the
    format of LLaVA's evaluation.
    """
    data = read_json(questions)
    entries = data.get("data") if isinstance(data, dict) else data
    if not isinstance(entries, list):
        raise ProbeError(
            f'{questions} has no list of questions, neither at the top nor under "data". Use TextVQA\'s own JSON, or '
            "JSON lines with one question each."
        )
    names = dict.fromkeys(_question_image(entry, index, questions) for index, entry in enumerate(entries))
    drawn = draw(list(names), num_samples, seed, "images", questions)
    return [(name, image_bytes(images / name, name)) for name in drawn]


def _question_image(entry: Any, index: int, path: Path) -> str:
    if isinstance(entry, dict):
        if isinstance(entry.get("image"), str):
            return str(entry["image"])
        if isinstance(entry.get("image_id"), str):
            return f"{entry['image_id']}.jpg"
    raise ProbeError(
        f"Question {index} of {path.name} has neither `image` nor `image_id`: {entry!r:.80}. Repair or remove it."
    )


def read_json(path: Path) -> Any:
    """The content of a JSON file, of a `.jsonl` file the list of its lines; ProbeError if it is none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ProbeError(f"Could not read {path} as JSON: {type(error).__name__}: {error}.") from error


def open_dataset(path: str, split: str) -> Any:
    """One split of a dataset: from a folder that `Dataset.save_to_disk` wrote, else by `datasets.load_dataset`."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"Reading dataset {path} needs the package datasets: pip install datasets.") from error
    folder = Path(path)
    try:
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(path)[split]
        if (folder / "state.json").is_file():
            return datasets.load_from_disk(path)
        return datasets.load_dataset(path, split=split)
    except Exception as error:  # a hub client, a builder or a file system may raise anything
        raise ProbeError(
            f"Could not load split {split} of dataset {path}: {type(error).__name__}: {error}. Check both names."
        ) from error


def images_of_dataset(dataset: Any, column: str, num_samples: int, seed: int) -> list[tuple[str, bytes]]:
    """Rows of an image column, not decoded."""
    stored = require_columns(dataset, {"image": column})
    feature = dataset.features[column]
    if type(feature).__name__ != "Image":
        raise ProbeError(
            f"image_column={column!r} is a column of type {feature}, not of images. Name another column, or cast it: "
            f"dataset.cast_column({column!r}, datasets.Image())."
        )
    stored = stored.cast_column(column, type(feature)(decode=False))
    found = []
    for row in _draw_rows(dataset, num_samples, seed):
        image, name = stored[row][column], f"row {row}"
        if image is None:
            raise ProbeError(f"The image of {name} is None. Drop such rows with dataset.filter.")
        content = image["bytes"]
        found.append((name, image_bytes(Path(image["path"]), name) if content is None else bytes(content)))
    return found


def texts_of_dataset(dataset: Any, column: str, num_samples: int, seed: int) -> list[tuple[str, str]]:
    """Rows of a text column."""
    stored = require_columns(dataset, {"text": column})
    found = []
    for row in _draw_rows(dataset, num_samples, seed):
        text = stored[row][column]
        if not isinstance(text, str):
            raise ProbeError(
                f"text_column={column!r} is not a column of strings: row {row} is a {type(text).__name__}. Name "
                "another column."
            )
        found.append((f"row {row}", text.strip()))
    return found


def require_columns(dataset: Any, columns: Mapping[str, str]) -> Any:
    """One split of a dataset with these columns only, by kind; ProbeError if it is no such dataset or lacks one."""
    # A DatasetDict has a dict of column names, a streamed dataset has no length.
    if not isinstance(getattr(dataset, "column_names", None), list) or not hasattr(dataset, "__len__"):
        raise ProbeError(
            f"dataset is a {type(dataset).__name__}. Pass one split of a Hugging Face dataset, not streamed: "
            'datasets.load_dataset(name, split="validation").'
        )
    for kind, column in columns.items():
        if column not in dataset.column_names:
            raise ProbeError(
                f"{kind}_column={column!r} is not a column of the dataset: {', '.join(dataset.column_names)}."
            )
    return dataset.select_columns(list(columns.values()))


def _draw_rows(dataset: Any, num_samples: int, seed: int) -> list[int]:
    return draw(list(range(len(dataset))), num_samples, seed, "dataset", f"a dataset of {len(dataset)} rows")
