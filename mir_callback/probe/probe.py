# SPDX-License-Identifier: Apache-2.0
"""A probe: a fixed list of image + text pairs with a fingerprint, which never changes while values are compared."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from mir_callback.errors import ConfigError, ProbeError
from mir_callback.probe import sources, storage
from mir_callback.probe.sources import as_path

# Enters the fingerprint: a change of how samples are encoded makes values that cannot be compared with older ones.
ENCODING = "image, text; plain prompt; version 1"
DEFAULT_MAX_TEXT_TOKENS = 1024


@dataclass(frozen=True)
class Sample:
    """One image and one text; they need not belong together.

    Attributes:
        name: where it came from, for messages only; not part of the fingerprint.
        image: the bytes of an image file, as found.
        text: the text that follows the image.
    """

    name: str
    image: bytes = field(repr=False)
    text: str = field(repr=False)

    def open_image(self) -> Image.Image:
        """Decode the image, completely, as RGB.

        Raises:
            ProbeError: the bytes are not a whole image.
        """
        try:
            with Image.open(io.BytesIO(self.image)) as image:
                return _to_rgb(image)
        except Exception as error:  # Pillow raises many kinds, from OSError to struct.error, for damaged files
            # An UnidentifiedImageError only names an object in memory.
            unknown = isinstance(error, UnidentifiedImageError)
            told = f"{len(self.image)} bytes of no known format" if unknown else f"{type(error).__name__}: {error}"
            raise ProbeError(
                f"probe image of {self.name} must be a readable image, got {told}; replace or remove that file"
            ) from error


@dataclass(frozen=True)
class Probe:
    """A fixed set of samples.

    Attributes:
        samples: the pairs, in order.
        max_text_tokens: texts are cut to this many tokens of the model's tokenizer.

    Raises:
        ProbeError: no samples, an unreadable image or an empty text; all are checked at construction.
    """

    samples: tuple[Sample, ...]
    max_text_tokens: int = DEFAULT_MAX_TEXT_TOKENS

    def __post_init__(self) -> None:
        """Check every sample, so that nothing can fail later that could have failed now."""
        object.__setattr__(self, "samples", tuple(self.samples))
        if not self.samples:
            raise ProbeError("samples must hold at least one image + text pair, got none; see Probe.from_folders")
        _require_positive_int("max_text_tokens", self.max_text_tokens)
        for sample in self.samples:
            sample.open_image()
            if not sample.text.strip():
                raise ProbeError(
                    f"probe text of {sample.name} must not be empty, got {sample.text!r}; replace or remove it"
                )
            try:
                sample.text.encode()
            except UnicodeEncodeError as error:
                raise ProbeError(
                    f"probe text of {sample.name} must be valid Unicode, got {error}; repair it"
                ) from error

    @classmethod
    def from_folders(
        cls,
        images: str | Path,
        texts: str | Path,
        num_samples: int = 100,
        seed: int = 0,
        *,
        max_text_tokens: int = DEFAULT_MAX_TEXT_TOKENS,
    ) -> Probe:
        """Draw images and texts from two folders, searched recursively; pairs need not belong together.

        Args:
            images: folder of image files.
            texts: folder of `.txt`, `.md` or `.story` files (of a story the part before its first @highlight).
            num_samples: how many pairs; the paper uses 100, and below 20 MIR fluctuates.
            seed: the draw depends on it and on the relative file names only.
            max_text_tokens: longer texts are cut to this many tokens.

        Raises:
            ProbeError: an empty or missing folder, fewer files than asked, an unreadable image, an empty text.
            ConfigError: num_samples, seed or max_text_tokens is not a proper integer.

        Ranks: any; every rank that calls it reads the files and gets the same probe. So it is with all draws here.
        """
        check_draw(num_samples, seed)
        drawn = sources.images_of_folder(as_path(images, "images"), num_samples, seed)
        read = sources.texts_of_folder(as_path(texts, "texts"), num_samples, seed)
        return cls(_pair_up(drawn, read), max_text_tokens)

    @classmethod
    def from_llava_json(
        cls,
        json_file: str | Path,
        images: str | Path,
        num_samples: int = 100,
        seed: int = 0,
        *,
        max_text_tokens: int = DEFAULT_MAX_TEXT_TOKENS,
    ) -> Probe:
        """Draw records from a LLaVA-format JSON list (`id`, `image`, `conversations`).

        The text of a record is what its turns say, without the image placeholder, one turn a line. Records without
        an image or with several are passed over.

        Args:
            json_file: the list of records.
            images: the folder the records' `image` paths start from.
            num_samples: how many records.
            seed: of the draw, which depends on the order of the records too.
            max_text_tokens: longer texts are cut to this many tokens.

        Raises:
            ProbeError: not such a list, fewer usable records than asked, a missing or unreadable image, empty text.
            ConfigError: as :meth:`from_folders`.
        """
        check_draw(num_samples, seed)
        folder = as_path(images, "images")
        drawn = sources.records_of_llava_json(as_path(json_file, "json_file"), folder, num_samples, seed)
        return cls(tuple(Sample(*record) for record in drawn), max_text_tokens)

    @classmethod
    def from_textvqa(
        cls,
        questions: str | Path,
        images: str | Path,
        texts: str | Path,
        num_samples: int = 100,
        seed: int = 0,
        *,
        max_text_tokens: int = DEFAULT_MAX_TEXT_TOKENS,
    ) -> Probe:
        """Draw the images of a TextVQA question file and texts from a folder: the paper's kind of probe.

        TextVQA keeps training and validation images in one folder; the question file of the validation split tells
        which are which.

        Args:
            questions: TextVQA's question JSON, or JSON lines with an `image` each.
            images: the folder with the images.
            texts: folder of texts, such as CNN/DailyMail's `.story` files.
            num_samples: how many pairs; the paper uses 100.
            seed: of the draw, which depends on the order of the questions too.
            max_text_tokens: longer texts are cut to this many tokens.

        Raises:
            ProbeError: not such a file, fewer images or texts than asked, a missing or unreadable image, empty text.
            ConfigError: as :meth:`from_folders`.
        """
        check_draw(num_samples, seed)
        asked, folder = as_path(questions, "questions"), as_path(images, "images")
        drawn = sources.images_of_questions(asked, folder, num_samples, seed)
        read = sources.texts_of_folder(as_path(texts, "texts"), num_samples, seed)
        return cls(_pair_up(drawn, read), max_text_tokens)

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        num_samples: int = 100,
        seed: int = 0,
        *,
        texts: Any = None,
        image_column: str = "image",
        text_column: str = "text",
        max_text_tokens: int = DEFAULT_MAX_TEXT_TOKENS,
    ) -> Probe:
        """Draw rows of a Hugging Face dataset with an image column and a text column.

        Args:
            dataset: a `datasets.Dataset` (one split, not streamed).
            num_samples: how many rows.
            seed: of the draw, which depends on the order of the rows too.
            max_text_tokens: longer texts are cut to this many tokens.
            texts: where to draw the texts from instead of the same rows: a folder of text files, or another
                `datasets.Dataset` with the text column.
            image_column: name of a column with the `Image` feature.
            text_column: name of a column of strings.

        Raises:
            ProbeError: not such a dataset, fewer rows than asked, an unreadable image, an empty text.
            ConfigError: as :meth:`from_folders`.
        """
        check_draw(num_samples, seed)
        drawn = sources.images_of_dataset(dataset, image_column, num_samples, seed)
        if isinstance(texts, (str, Path)):
            read = sources.texts_of_folder(as_path(texts, "texts"), num_samples, seed)
        else:
            read = sources.texts_of_dataset(dataset if texts is None else texts, text_column, num_samples, seed)
        return cls(_pair_up(drawn, read), max_text_tokens)

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[Any, Any]], *, max_text_tokens: int = DEFAULT_MAX_TEXT_TOKENS) -> Probe:
        """Build a probe from images (PIL) and texts (str) in memory; images are kept as lossless PNG.

        Raises:
            ProbeError: no pairs, something else than an image and a text, an unreadable image, an empty text.

        Ranks: any.
        """
        samples = []
        for index, pair in enumerate(pairs):
            parts = tuple(pair) if isinstance(pair, (tuple, list)) else (pair,)
            if len(parts) != 2 or not isinstance(parts[0], Image.Image) or not isinstance(parts[1], str):
                got = " and ".join(type(part).__name__ for part in parts) or "nothing"
                raise ProbeError(f"pair {index} must be a PIL image and a text, got {got}; open the image first")
            buffer = io.BytesIO()
            try:
                _to_rgb(parts[0]).save(buffer, format="PNG")
            except Exception as error:  # of a file that was opened and is damaged: any kind
                raise ProbeError(
                    f"the image of pair {index} must be readable, got {type(error).__name__}: {error}; replace it"
                ) from error
            samples.append(Sample(f"pair {index}", buffer.getvalue(), parts[1]))
        return cls(tuple(samples), max_text_tokens)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over the contents (image bytes, texts, order) and the encoding (cut, prompt form)."""
        digest = hashlib.sha256(f"{ENCODING}; max_text_tokens={self.max_text_tokens}".encode())
        for sample in self.samples:
            digest.update(hashlib.sha256(sample.image).digest())
            digest.update(hashlib.sha256(sample.text.encode()).digest())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def save(self, path: str | Path) -> Path:
        """Write the probe as one file (a path ending in .zip) or as one folder that another team can use.

        The write is complete or not there at all. An existing probe is replaced, anything else is not.

        Args:
            path: where to; parents are created.

        Returns:
            The path written.

        Raises:
            ProbeError: something that is no probe stands at ``path``.

        Ranks: rank 0 only.
        """
        entries = [(sample.name, sample.image, sample.text) for sample in self.samples]
        return storage.write(as_path(path, "path"), entries, self.max_text_tokens, self.fingerprint)

    @classmethod
    def load(cls, path: str | Path) -> Probe:
        """Read a probe that :meth:`save` wrote.

        Raises:
            ProbeError: nothing there, not a probe, damaged, or its contents do not match its stored fingerprint.

        Ranks: any.
        """
        stored = storage.read(as_path(path, "path"))
        samples = tuple(Sample(*entry) for entry in stored.entries)
        probe = cls(samples, stored.max_text_tokens)
        if probe.fingerprint != stored.fingerprint:
            raise ProbeError(
                f"probe {path}: contents must match the stored fingerprint {stored.fingerprint}, "
                f"got {probe.fingerprint}; the files were edited or written for another encoding, save the probe anew"
            )
        return probe


@dataclass(frozen=True, kw_only=True)
class ProbeSource:
    """Where a probe comes from: a saved one, or a draw from two folders.

    Raises:
        ConfigError: they contradict each other, or a number is none.
    """

    probe: Any = field(default=None, metadata={"help": "a saved probe (see `mir probe`) instead of the two folders"})
    images: Any = field(default=None, metadata={"help": "folder of probe images; switches MIR on"})
    texts: Any = field(default=None, metadata={"help": "folder of probe texts (.txt, .md, .story)"})
    num_samples: int | None = field(
        default=None, metadata={"help": "image and text pairs to draw from the folders (default: 100)"}
    )
    seed: int | None = field(default=None, metadata={"help": "seed of the draw (default: 0)"})

    def __post_init__(self) -> None:
        """Check what can be checked without reading."""
        if (self.images is None) != (self.texts is None):
            raise ConfigError(
                f"images and texts go together, got images={self.images!r} and texts={self.texts!r}; a text is drawn "
                "for every image"
            )
        if self.probe is not None and self.images is not None:
            raise ConfigError("give either a probe or images and texts, got both; a saved probe has its own")
        if self.probe is not None and (self.num_samples is not None or self.seed is not None):
            raise ConfigError("num_samples and seed are of a draw from folders, got one with a probe; leave it out")
        check_draw(1 if self.num_samples is None else self.num_samples, self.seed or 0)

    @property
    def is_given(self) -> bool:
        """Whether there is one."""
        return self.probe is not None or self.images is not None

    def load(self) -> Probe:
        """Draw or read the probe.

        Raises:
            ConfigError: there is none.
            ProbeError: as :meth:`Probe.load` and :meth:`Probe.from_folders`.

        Ranks: any, each for itself.
        """
        if not self.is_given:
            raise ConfigError("no probe: give one (a file that Probe.save wrote will do), or images and texts")
        if self.probe is not None:
            return self.probe if isinstance(self.probe, Probe) else Probe.load(self.probe)
        draw = {"num_samples": self.num_samples, "seed": self.seed}
        given = {name: value for name, value in draw.items() if value is not None}
        return Probe.from_folders(self.images, self.texts, **given)


def _pair_up(images: list[tuple[str, bytes]], texts: list[tuple[str, str]]) -> tuple[Sample, ...]:
    """Samples of drawn images and texts; those of one row of a dataset have one name."""
    return tuple(
        Sample(name if name == text_name else f"{name} + {text_name}", image, text)
        for (name, image), (text_name, text) in zip(images, texts, strict=True)
    )


def check_draw(num_samples: int, seed: int) -> None:
    """Raise ConfigError unless both are whole numbers, and ``num_samples`` is positive. Ranks: pure."""
    _require_positive_int("num_samples", num_samples)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"seed must be an integer, got {seed!r}; use e.g. seed=0")


def _require_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}; use a whole number")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(f"mode {image.mode} has more than 8 bits a channel and would not keep its shades")
    return image.convert("RGB")
