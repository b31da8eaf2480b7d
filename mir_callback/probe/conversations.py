# SPDX-License-Identifier: Apache-2.0
"""Samples from training data in which images and videos stand among the turns of a conversation.

LLaVA's JSON, and rows of a Hugging Face dataset with a text or with `messages`. The text of a sample is the text of all
turns, one turn a line; its images are where the text has `<image>`, and its videos where it has `<video>`.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mir_callback.errors import ConfigError, ProbeError
from mir_callback.probe.sample import Part, Picture, Sample, Video, opened, to_png
from mir_callback.probe.sources import IMAGE_SUFFIXES, draw, image_bytes, read_json, require_columns, require_enough

PAIRS, IMAGES, ALL = LAYOUTS = ("pairs", "images", "all")
DEFAULT_VIDEO_FRAMES = 8
DEFAULT_IMAGE_COLUMN = "image"
_MARKS = {"image": "<image>", "video": "<video>"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """Which records to take, and how many frames of a video.

    Attributes:
        layouts: "pairs": those with one image, then one text; "images": with any images or videos; "all": those without
            too.
        video_frames: frames to take of each video.

    Raises:
        ConfigError: ``layouts`` is none of these, or ``video_frames`` no positive integer.
    """

    layouts: str
    video_frames: int

    def __post_init__(self) -> None:
        """Check both."""
        if self.layouts not in LAYOUTS:
            raise ConfigError(f"layouts must be one of {', '.join(LAYOUTS)}, got {self.layouts!r}.")
        if isinstance(self.video_frames, bool) or not isinstance(self.video_frames, int) or self.video_frames < 1:
            raise ConfigError(f"video_frames must be a positive integer, got {self.video_frames!r}.")

    def takes(self, *, is_pair: bool, has_vision: bool) -> bool:
        """Whether to take such a sample."""
        return {PAIRS: is_pair, IMAGES: has_vision, ALL: True}[self.layouts]

    def explain(self, left_out: int) -> str:
        """What to say of records that were not taken."""
        return f"; layouts={self.layouts!r} leaves out {left_out} more" if left_out else ""


@dataclass(frozen=True)
class _Record:
    """A record of LLaVA's JSON, of which no image has been read yet."""

    name: str
    turns: list[str]
    images: list[str]
    videos: list[str]


def records_of_llava_json(json_file: Path, folder: Path, num_samples: int, seed: int, choice: Choice) -> list[Sample]:
    """Records of a LLaVA-format list, with images and videos of ``folder``."""
    data = read_json(json_file)
    if not isinstance(data, list):
        raise ProbeError(
            f"{json_file} is a JSON {type(data).__name__}, not a list of records in LLaVA's format: "
            '[{"id": ..., "image": ..., "conversations": [...]}, ...].'
        )
    records = [_record(entry, index, json_file) for index, entry in enumerate(data)]
    usable = [
        each
        for each in records
        if choice.takes(
            is_pair=len(each.images) == 1 and not each.videos, has_vision=bool(each.images) or bool(each.videos)
        )
    ]
    left_out = choice.explain(len(records) - len(usable))
    if left_out:
        log.info("the probe is drawn from %d records of %s%s", len(usable), json_file, left_out)
    origin = f"{json_file}{left_out}"
    return [_read(record, folder, choice) for record in draw(usable, num_samples, seed, "json_file", origin)]


def _record(entry: Any, index: int, json_file: Path) -> _Record:
    name = f"record {entry.get('id', index) if isinstance(entry, dict) else index} of {json_file.name}"
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get("value"), str) for t in turns):
        raise ProbeError(
            f'{name} has no conversations in LLaVA\'s format, a list of {{"from": ..., "value": text}}: {turns!r:.80}. '
            "Repair or remove it."
        )
    return _Record(name, [turn["value"] for turn in turns], *(_paths(entry.get(kind), kind, name) for kind in _MARKS))


def _paths(given: Any, kind: str, name: str) -> list[str]:
    paths = given if isinstance(given, list) else [given] if given else []
    if not all(isinstance(path, str) for path in paths):
        raise ProbeError(f"The {kind} of {name} is neither a path nor a list of paths: {given!r:.80}. Repair it.")
    return paths


def _read(record: _Record, folder: Path, choice: Choice) -> Sample:
    name, turns = record.name, record.turns
    images = [Picture(image_bytes(folder / path, name)) for path in record.images]
    videos = [read_video(folder / path, choice.video_frames, name) for path in record.videos]
    if len(images) == 1 and not videos:  # LLaVA itself puts a single image first, wherever it is
        return Sample(name, (images[0], _join(turn.replace(_MARKS["image"], "") for turn in turns)))
    return Sample(name, place(_join(turns), images, videos, name))


def _join(turns: Iterable[str]) -> str:
    return "\n".join(text for turn in turns if (text := turn.strip()))


def place(text: str, images: Sequence[Picture], videos: Sequence[Video], name: str) -> tuple[Part, ...]:
    """A text with images and videos in the places of its marks; those of a kind without marks come first.

    ProbeError if there are more or fewer marks than images or videos. Ranks: pure.

    Example:
        >>> place("a <image> in <image>", [Picture(b"1"), Picture(b"2")], [], "row 0")
        ('a ', Picture(), ' in ', Picture())
    """
    pieces = re.split(f"({'|'.join(_MARKS.values())})", text)
    parts: list[Part] = []
    waiting: dict[str, Iterator[Part]] = {}
    kinds: tuple[Sequence[Part], ...] = (images, videos)
    for (kind, mark), given in zip(_MARKS.items(), kinds, strict=True):
        count = pieces.count(mark)
        if count not in (0, len(given)):
            raise ProbeError(
                f"{name} has {count} {mark} and {len(given)} {kind}s. Give as many of both, or no {mark}, and the "
                f"{kind}s come first."
            )
        waiting[mark] = iter(given)
        if not count:
            parts += given
    for piece in pieces:
        if piece in waiting:
            parts.append(next(waiting[piece]))
        elif piece:
            parts.append(piece)
    if len(parts) == 2 and isinstance(parts[0], Picture) and isinstance(parts[1], str):
        parts[1] = parts[1].strip()  # a pair, as of LLaVA's files
    return tuple(parts)


def read_video(path: Path, count: int, name: str) -> Video:
    """Evenly spread frames of a video: a folder with an image file a frame, in natural order, or an animated image."""
    if path.is_dir():
        files = sorted((each for each in path.iterdir() if each.suffix.lower() in IMAGE_SUFFIXES), key=_natural)
        if not files:
            raise ProbeError(f"The video of {name}, the folder {path}, has no image files. Check the path.")
        return Video(tuple(image_bytes(files[index], name) for index in _spread(len(files), count)))
    data = image_bytes(path, name)
    try:
        with opened(data, f"the video of {name}") as image:
            frames = []
            for index in _spread(getattr(image, "n_frames", 1), count):
                image.seek(index)
                frames.append(to_png(image))
    except ProbeError as error:
        raise ProbeError(
            f"{error} A video is read from a folder with an image file a frame (mkdir FRAMES; ffmpeg -i {path.name} "
            "FRAMES/%05d.jpg), or from an animated image."
        ) from error
    return Video(tuple(frames))


def _natural(path: Path) -> list[tuple[int, str]]:
    """So that frame 10 comes after frame 9."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)]


def _spread(length: int, count: int) -> list[int]:
    """At most ``count`` indices from the first to the last one."""
    if count >= length:
        return list(range(length))
    return [round(index * (length - 1) / max(1, count - 1)) for index in range(count)]


def has_layouts(dataset: Any, columns: Mapping[str, str | None], choice: Choice) -> bool:
    """Whether rows of a dataset may be anything else than one image and a string."""
    features = getattr(dataset, "features", None) or {}
    lists = (features.get(columns["image"]), features.get(columns["text"]))
    return (
        choice.layouts != PAIRS
        or columns["video"] is not None
        or any(isinstance(each, (list, dict)) or hasattr(each, "feature") for each in lists)
    )


def samples_of_dataset(
    dataset: Any, columns: Mapping[str, str | None], num_samples: int, seed: int, choice: Choice
) -> list[Sample]:
    """Rows of a dataset with lists of images, with videos, or with `messages`; ``columns`` by kind of part.

    Rows are looked at in a random order until enough are found, so that no more images than necessary are read.
    """
    named = {kind: column for kind, column in columns.items() if column is not None}
    features = getattr(dataset, "features", None) or {}
    is_string = getattr(features.get(named["text"]), "dtype", None) == "string"
    if named.get("image") == DEFAULT_IMAGE_COLUMN not in features and not is_string:
        del named["image"]  # messages may bring their images along
    stored = require_columns(dataset, named).with_format("arrow")
    found: list[Sample] = []
    order = random.Random(seed).sample(range(len(dataset)), len(dataset))
    left_out = 0
    for row in order:
        if len(found) == num_samples:
            break
        name, values = f"row {row}", stored[row].to_pylist()[0]
        images = [_picture(each, name) for each in _listed(values.get(named.get("image")))]
        videos = list(_videos(values.get(named.get("video")), choice.video_frames, name))
        text, within = _text_of(values[named["text"]], named["text"], name)
        if images and within:
            raise ProbeError(f"{name} has images in {named['image']!r} and in its turns. Give image_column=None.")
        sample = Sample(name, place(text, images or within, videos, name))
        if choice.takes(is_pair=sample.is_pair, has_vision=sample.has_vision):
            found.append(sample)
        else:
            left_out += 1
    require_enough(len(found), num_samples, "dataset", f"a dataset of {len(order)} rows{choice.explain(left_out)}")
    if left_out:
        log.info("the probe is drawn from a dataset%s of the rows looked at", choice.explain(left_out))
    return found


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _is_given(stored: Any) -> bool:
    """Whether an item brings an image along; datasets fill in the keys that other items have."""
    return any(each is not None for each in (stored.values() if isinstance(stored, Mapping) else [stored]))


def _picture(stored: Any, name: str) -> Picture:
    if isinstance(stored, str):
        scheme, _, path = stored.rpartition("://")
        if scheme not in ("", "file"):
            raise ProbeError(f"An image of {name} is {stored!r:.80}: nothing is downloaded. Give a path.")
        return Picture(image_bytes(Path(path), name))
    if not isinstance(stored, Mapping) or not {"bytes", "path"} & stored.keys():
        raise ProbeError(f"An image of {name} is {stored!r:.80}, not a stored image or a path. Name another column.")
    content = stored.get("bytes")
    return Picture(image_bytes(Path(str(stored.get("path"))), name) if content is None else bytes(content))


def _videos(value: Any, count: int, name: str) -> Iterator[Video]:
    """The videos of a row: a path or a list of paths; a list of frames, or several such lists."""
    if isinstance(value, Mapping):
        raise ProbeError(f"A video of {name} is stored as one file. Give its path, or a list of its frames.")
    given = _listed(value)
    if given and all(isinstance(each, Mapping) for each in given):
        given = [given]
    for each in given:
        if isinstance(each, str):
            yield read_video(Path(each), count, name)
        elif isinstance(each, list) and each:
            yield Video(tuple(_picture(each[index], name).data for index in _spread(len(each), count)))
        else:
            raise ProbeError(f"A video of {name} is {each!r:.80}, neither a path nor a list of frames.")


def _text_of(value: Any, column: str, name: str) -> tuple[str, list[Picture]]:
    """A text with marks, from a string or the turns of a conversation, and the images that its turns bring along."""
    if isinstance(value, str):
        return value.strip(), []
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise ProbeError(
            f"text_column={column!r} holds neither strings nor conversations: {name} is a {type(value).__name__}. Name "
            "another column."
        )
    images: list[Picture] = []
    return _join([_turn(turn.get("content", turn.get("value")), name, images) for turn in value]), images


def _turn(content: Any, name: str, images: list[Picture]) -> str:
    """The text of a turn: as it is, or the items of a list in order, whose images are added to ``images``."""
    if content is None or isinstance(content, str):
        return content or ""
    pieces = []
    for item in content if isinstance(content, list) else [content]:
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind != "text" and kind not in _MARKS:
            raise ProbeError(
                f"The conversation of {name} has {item!r:.80} in a turn, which is no text, image or video in the form "
                '{"type": "text", "text": ...}, {"type": "image"}, {"type": "video"}. Repair or leave out such rows.'
            )
        brought = [item[key] for key in ("image", "path", "url") if kind == "image" and _is_given(item.get(key))]
        images += [_picture(each, name) for each in brought[:1]]
        pieces.append(str(item.get("text") or "") if kind == "text" else _MARKS[kind])
    return "".join(pieces)
