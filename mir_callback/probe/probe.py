# SPDX-License-Identifier: Apache-2.0
"""A probe: a fixed list of image + text pairs. Only MIR values with the same probe fingerprint can be compared."""

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

# Part of the fingerprint: values of samples that are encoded differently cannot be compared.
ENCODING = "image, text; plain prompt; version 1"
DEFAULT_MAX_TEXT_TOKENS = 1024
MAX_PIXELS = 89_478_485  # of one image; where Pillow warns of a decompression bomb
# Pillow opens more, some of it with other programs (EPS) or without a limit (FITS).
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")


@dataclass(frozen=True)
class Sample:
    """One image and one text. The text need not describe the image.

    Attributes:
        name: where it came from, for messages only; not part of the fingerprint.
        image: bytes of an encoded image file (PNG, JPEG, ...).
        text: the text that follows the image.

    Example:
        >>> from mir_callback import Probe
        >>> from PIL import Image
        >>> sample = Probe.from_pairs([(Image.new("RGB", (8, 6)), "a black rectangle")]).samples[0]
        >>> sample.name, sample.text, sample.open_image().size
        ('pair 0', 'a black rectangle', (8, 6))
    """

    name: str
    image: bytes = field(repr=False)
    text: str = field(repr=False)

    def open_image(self) -> Image.Image:
        """Decode the whole image, as RGB.

        Raises:
            ProbeError: the bytes are not a whole image of one of FORMATS, it has more than MAX_PIXELS pixels, or more
                than 8 bits per channel.
        """
        try:
            with Image.open(io.BytesIO(self.image)) as image:
                if image.width * image.height > MAX_PIXELS:
                    size = f"{image.width} x {image.height} = {image.width * image.height} pixels"
                    raise Image.DecompressionBombError(f"it has {size}.")
                if image.format not in FORMATS:
                    raise ValueError(f"its format is {image.format}, not one of {', '.join(FORMATS)}")
                return _to_rgb(image)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ProbeError(
                f"The image of {self.name} is too large (at most {MAX_PIXELS} pixels): {error} Scale it down or remove "
                "it."
            ) from error
        except Exception as error:  # Pillow raises many kinds, from OSError to struct.error, for damaged files
            # The message of an UnidentifiedImageError only names an object in memory.
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "not a known image format" if unknown else f"{type(error).__name__}: {error}"
            raise ProbeError(
                f"Could not decode the image of {self.name} ({len(self.image)} bytes): {reason}. Replace or remove it."
            ) from error


@dataclass(frozen=True)
class Probe:
    """A fixed set of samples to measure MIR on. Usually made by one of the ``from_...`` methods, or :meth:`load`.

    Attributes:
        samples: the image + text pairs, in order.
        max_text_tokens: texts are cut to this many tokens of the model's tokenizer.
        matched: whether each text belongs to its image, as ``vision_gain`` needs. MIR is the same either way, so it is
            not part of the fingerprint.

    Raises:
        ProbeError: no samples, an unreadable or too large image, or an empty text. Every sample is checked here, so
            that no evaluation fails on it later.
        ConfigError: ``max_text_tokens`` is not a positive integer, or ``matched`` not a bool.

    Example::

        probe = Probe.from_folders(images="textvqa/val", texts="cnn/stories", num_samples=100, seed=0)
        probe.save("probe.zip")
        assert Probe.load("probe.zip").fingerprint == probe.fingerprint
    """

    samples: tuple[Sample, ...]
    max_text_tokens: int = DEFAULT_MAX_TEXT_TOKENS
    matched: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check every sample."""
        if not isinstance(self.matched, bool):
            raise ConfigError(f"matched must be True or False, got {self.matched!r}.")
        object.__setattr__(self, "samples", tuple(self.samples))
        if not self.samples:
            raise ProbeError("The probe has no samples. Give it at least one image + text pair.")
        _require_positive_int("max_text_tokens", self.max_text_tokens)
        for sample in self.samples:
            sample.open_image()
            if not sample.text.strip():
                raise ProbeError(f"The text of {sample.name} is empty. Replace or remove it.")
            try:
                sample.text.encode()
            except UnicodeEncodeError as error:
                raise ProbeError(f"The text of {sample.name} is not valid Unicode: {error}. Repair it.") from error

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
        """Draw images and texts from two folders, searched recursively, and pair them as drawn.

        Args:
            images: folder of image files.
            texts: folder of `.txt`, `.md` or `.story` files (of a story the part before its first @highlight).
            num_samples: how many pairs; the paper uses 100, and below 20 MIR fluctuates.
            seed: of the random draw, which depends on nothing else but the relative file names.
            max_text_tokens: longer texts are cut to this many tokens.

        Raises:
            ProbeError: an empty or missing folder, fewer files than asked for, an unreadable image, an empty text.
            ConfigError: num_samples or max_text_tokens is not a positive integer, or seed is not an integer.

        Ranks: any. Each rank that calls it reads the files and gets the same probe; the other ``from_...`` methods
        likewise.

        Example::

            probe = Probe.from_folders(images="textvqa/val", texts="cnn/stories", num_samples=100, seed=0)
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

        The text of a sample is the text of all turns of its record, one turn a line, without the `<image>` placeholder.
        Records without an image or with several are skipped.

        Args:
            json_file: the list of records.
            images: the folder that the records' `image` paths are relative to.
            num_samples: how many records.
            seed: of the random draw, which also depends on the order of the records.
            max_text_tokens: longer texts are cut to this many tokens.

        Raises:
            ProbeError: not such a list, fewer usable records than asked for, an unreadable image, an empty text.
            ConfigError: as :meth:`from_folders`.

        Example::

            probe = Probe.from_llava_json("blip_laion_cc_sbu_558k.json", images="pretrain/images", num_samples=100)
        """
        check_draw(num_samples, seed)
        folder = as_path(images, "images")
        drawn = sources.records_of_llava_json(as_path(json_file, "json_file"), folder, num_samples, seed)
        return cls(tuple(Sample(*record) for record in drawn), max_text_tokens, matched=True)

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
        """Draw images that a TextVQA question file names, and texts from a folder, as in the paper.

        TextVQA keeps training and validation images in one folder; the question file of the validation split lists
        those of that split.

        Args:
            questions: TextVQA's question JSON, or JSON lines with an `image` each.
            images: the folder with the images.
            texts: folder of texts, such as CNN/DailyMail's `.story` files.
            num_samples: how many pairs; the paper uses 100.
            seed: of the random draw, which also depends on the order of the questions.
            max_text_tokens: longer texts are cut to this many tokens.

        Raises:
            ProbeError: not such a file, fewer images or texts than asked for, an unreadable image, an empty text.
            ConfigError: as :meth:`from_folders`.

        Example::

            probe = Probe.from_textvqa("TextVQA_0.5.1_val.json", images="train_images", texts="cnn/stories")
        """
        check_draw(num_samples, seed)
        file, folder = as_path(questions, "questions"), as_path(images, "images")
        drawn = sources.images_of_questions(file, folder, num_samples, seed)
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
            seed: of the random draw, which also depends on the order of the rows.
            texts: draw the texts from here and not from the same rows: a folder of text files, or another
                `datasets.Dataset` with the text column.
            image_column: name of a column with the `Image` feature.
            text_column: name of a column of strings.
            max_text_tokens: longer texts are cut to this many tokens.

        Raises:
            ProbeError: not such a dataset, fewer rows than asked for, an unreadable image, an empty text.
            ConfigError: as :meth:`from_folders`.

        Example::

            dataset = datasets.load_dataset("lmms-lab/textvqa", split="validation")
            probe = Probe.from_dataset(dataset, text_column="question")
        """
        check_draw(num_samples, seed)
        drawn = sources.images_of_dataset(dataset, image_column, num_samples, seed)
        if isinstance(texts, (str, Path)):
            read = sources.texts_of_folder(as_path(texts, "texts"), num_samples, seed)
        else:
            read = sources.texts_of_dataset(dataset if texts is None else texts, text_column, num_samples, seed)
        return cls(_pair_up(drawn, read), max_text_tokens, matched=texts is None)

    @classmethod
    def from_pairs(
        cls,
        pairs: Iterable[tuple[Any, Any]],
        *,
        matched: bool = False,
        max_text_tokens: int = DEFAULT_MAX_TEXT_TOKENS,
    ) -> Probe:
        """Build a probe from images and texts in memory. Images are stored as PNG, without loss.

        Args:
            pairs: (image, text) tuples: a PIL image of at most 8 bits per channel, and a non-empty string.
            matched: whether each text belongs to its image, as ``vision_gain`` needs.
            max_text_tokens: longer texts are cut to this many tokens.

        Raises:
            ProbeError: no pairs, a pair that is not an image and a text, an unreadable image, an empty text.
            ConfigError: max_text_tokens is not a positive integer, or matched not a bool.

        Ranks: any. Ranks that call it with the same pairs get the same probe.

        Example:
            >>> from mir_callback import Probe
            >>> from PIL import Image
            >>> probe = Probe.from_pairs([(Image.new("RGB", (8, 6)), "a black rectangle")])
            >>> len(probe), probe.samples[0].text
            (1, 'a black rectangle')
        """
        samples = []
        pair: Any  # whatever the caller passed
        for index, pair in enumerate(pairs):
            name = f"pair {index}"
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                count = f" with {len(pair)} items" if isinstance(pair, (tuple, list)) else ""
                raise ProbeError(f"{name} is a {type(pair).__name__}{count}. Pass (image, text) tuples.")
            image, text = pair
            if not isinstance(image, Image.Image):
                raise ProbeError(
                    f"The image of {name} is a {type(image).__name__}, not a PIL image: {image!r:.80}. Pass "
                    "PIL.Image.open(path), or PIL.Image.fromarray(array)."
                )
            if not isinstance(text, str):
                raise ProbeError(f"The text of {name} is a {type(text).__name__}, not a string: {text!r:.80}.")
            buffer = io.BytesIO()
            try:
                _to_rgb(image).save(buffer, format="PNG")
            except Exception as error:  # of a file that was opened and is damaged: any kind
                raise ProbeError(
                    f"Could not read the image of {name}: {type(error).__name__}: {error}. Replace it."
                ) from error
            samples.append(Sample(name, buffer.getvalue(), text))
        return cls(tuple(samples), max_text_tokens, matched=matched)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of image bytes, texts, their order, max_text_tokens and the encoding rules; 16 hexadecimal digits."""
        digest = hashlib.sha256(f"{ENCODING}; max_text_tokens={self.max_text_tokens}".encode())
        for sample in self.samples:
            digest.update(hashlib.sha256(sample.image).digest())
            digest.update(hashlib.sha256(sample.text.encode()).digest())
        return digest.hexdigest()[:16]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples)

    def save(self, path: str | Path) -> Path:
        """Write the probe to disk, atomically: as a zip file if ``path`` ends in .zip, else as a folder.

        Args:
            path: where to write; parent folders are created, and a probe that is there already is replaced.

        Returns:
            The path written, with ``~`` expanded.

        Raises:
            ProbeError: ``path`` exists and is not a probe, or cannot be written to.

        Ranks: rank 0 only.
        """
        entries = [(sample.name, sample.image, sample.text) for sample in self.samples]
        stored = storage.StoredProbe(entries, self.max_text_tokens, self.fingerprint, self.matched)
        return storage.write(as_path(path, "path"), stored)

    @classmethod
    def load(cls, path: str | Path) -> Probe:
        """Read a probe that :meth:`save` wrote.

        Raises:
            ProbeError: there is no probe at ``path``, it is damaged, or it does not match its stored fingerprint.

        Ranks: any.
        """
        stored = storage.read(as_path(path, "path"))
        samples = tuple(Sample(*entry) for entry in stored.entries)
        probe = cls(samples, stored.max_text_tokens, matched=stored.matched)
        if probe.fingerprint != stored.fingerprint:
            raise ProbeError(
                f"Probe {path} has fingerprint {probe.fingerprint}, but {stored.fingerprint} was stored with it: its "
                "files were edited, or written by a version that encodes samples differently. Save the probe again."
            )
        return probe


@dataclass(frozen=True, kw_only=True)
class ProbeSource:
    """Where a probe comes from: a saved one, or a random draw from two folders.

    Raises:
        ConfigError: fields that contradict each other, or an invalid number.
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
                f"Give both images and texts: images={self.images!r}, texts={self.texts!r}. "
                "A text is drawn for every image."
            )
        if self.probe is not None and self.images is not None:
            raise ConfigError("Give either a probe, or images and texts, not both: a probe has images and texts.")
        if self.probe is not None and (self.num_samples is not None or self.seed is not None):
            raise ConfigError(
                "num_samples and seed only apply to drawing samples from folders. Leave them out with a probe."
            )
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
            raise ConfigError("No probe given. Give one (a Probe, or the path of a saved one), or images and texts.")
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
    """Raise ConfigError unless both are integers and ``num_samples`` is positive. Ranks: pure."""
    _require_positive_int("num_samples", num_samples)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"seed must be an integer, got {seed!r}.")


def _require_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a positive integer, got {value!r}.")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(f"mode {image.mode} has more than 8 bits per channel, which RGB would clip")
    return image.convert("RGB")
