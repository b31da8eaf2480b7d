# SPDX-License-Identifier: Apache-2.0
"""A probe: a fixed list of samples. Only MIR values with the same probe fingerprint can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from mir_callback.errors import ConfigError, ProbeError
from mir_callback.probe import conversations, sources, storage
from mir_callback.probe.conversations import DEFAULT_VIDEO_FRAMES, PAIRS, Choice
from mir_callback.probe.sample import Part, Picture, Sample, Video, contents_of, to_png
from mir_callback.probe.sources import as_path

__all__ = ["DEFAULT_MAX_TEXT_TOKENS", "Probe", "ProbeSource", "Sample"]

# Part of the fingerprint: values of samples that are encoded differently cannot be compared.
ENCODING = "image, text; plain prompt; version 1"  # of a probe of pairs
LAYOUTS_ENCODING = "parts in order; version 1"
DEFAULT_MAX_TEXT_TOKENS = 1024


@dataclass(frozen=True)
class Probe:
    """A fixed set of samples to measure MIR on. Usually made by one of the ``from_...`` methods, or :meth:`load`.

    Attributes:
        samples: in order, usually image + text pairs; see :class:`Sample`.
        max_text_tokens: texts are cut to this many tokens of the model's tokenizer.
        matched: whether each text belongs to its images, as ``vision_gain`` needs. MIR is the same either way, so it is
            not part of the fingerprint.

    Raises:
        ProbeError: no samples or none with an image, an unreadable or too large image, or a sample without a text.
            Every sample is checked here, so that no evaluation fails on it later.
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
            sample.check()
        if not any(sample.has_vision for sample in self.samples):
            raise ProbeError("No sample of the probe has an image. Add some that do; MIR compares images with texts.")

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
        layouts: str = PAIRS,
        video_frames: int = DEFAULT_VIDEO_FRAMES,
        max_text_tokens: int = DEFAULT_MAX_TEXT_TOKENS,
    ) -> Probe:
        """Draw records from a LLaVA-format JSON list (`id`, `image` or `video`, `conversations`).

        The text of a sample is the text of all turns of its record, one turn a line. A single image comes before it;
        several, and videos, are where the `<image>` and `<video>` of the text are, or first if it has none.

        Args:
            json_file: the list of records.
            images: the folder that the records' `image` and `video` paths are relative to.
            num_samples: how many records.
            seed: of the random draw, which also depends on the order of the records.
            layouts: which records to draw from. "pairs": those with one image; "images": with any number of images and
                videos; "all": those without too, as text-only samples.
            video_frames: frames to take of each video, evenly spread. A video is a folder with an image file a frame,
                or an animated image (GIF, WebP, PNG, TIFF).
            max_text_tokens: longer texts are cut to this many tokens.

        Raises:
            ProbeError: not such a list, fewer usable records than asked for, more or fewer `<image>` than images, an
                unreadable image or video, an empty text.
            ConfigError: ``layouts`` is none of these, ``video_frames`` no positive integer; or as :meth:`from_folders`.

        Example::

            probe = Probe.from_llava_json("blip_laion_cc_sbu_558k.json", images="pretrain/images", num_samples=100)
        """
        check_draw(num_samples, seed)
        choice = Choice(layouts, video_frames)
        file, folder = as_path(json_file, "json_file"), as_path(images, "images")
        drawn = conversations.records_of_llava_json(file, folder, num_samples, seed, choice)
        return cls(tuple(drawn), max_text_tokens, matched=True)

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
        image_column: str | None = conversations.DEFAULT_IMAGE_COLUMN,
        text_column: str = "text",
        video_column: str | None = None,
        layouts: str = PAIRS,
        video_frames: int = DEFAULT_VIDEO_FRAMES,
        max_text_tokens: int = DEFAULT_MAX_TEXT_TOKENS,
    ) -> Probe:
        """Draw rows of a Hugging Face dataset with images and a text, or with `messages`.

        Args:
            dataset: a `datasets.Dataset` (one split, not streamed).
            num_samples: how many rows.
            seed: of the random draw, which also depends on the order of the rows.
            texts: draw the texts from here and not from the same rows: a folder of text files, or another
                `datasets.Dataset` with the text column.
            image_column: name of a column with an image, or a list of images, a row; None if there is none.
            text_column: name of a column of strings, or of conversations: lists of turns whose `content` is a string,
                or a list of items of type "text", "image" and "video". Images are where a text has `<image>` or such
                an item, which may bring its image along as `image`, or first if it has none, and videos likewise. The
                text of a sample is the text of all turns, one turn a line.
            video_column: name of a column with videos: paths as for :meth:`from_llava_json`, or lists of frames.
            layouts: which rows to draw from, as for :meth:`from_llava_json`.
            video_frames: frames to take of each video, evenly spread.
            max_text_tokens: longer texts are cut to this many tokens.

        Raises:
            ProbeError: not such a dataset, fewer usable rows than asked for, more or fewer `<image>` than images, an
                unreadable image or video, an empty text.
            ConfigError: as :meth:`from_llava_json`.

        Example::

            dataset = datasets.load_dataset("lmms-lab/textvqa", split="validation")
            probe = Probe.from_dataset(dataset, text_column="question")
            probe = Probe.from_dataset(sft_data, image_column="images", text_column="messages", layouts="images")
        """
        check_draw(num_samples, seed)
        choice = Choice(layouts, video_frames)
        columns = {"image": image_column, "text": text_column, "video": video_column}
        if texts is None and conversations.has_layouts(dataset, columns, choice):
            samples = conversations.samples_of_dataset(dataset, columns, num_samples, seed, choice)
            return cls(tuple(samples), max_text_tokens, matched=True)
        if image_column is None or video_column is not None or layouts != PAIRS:
            raise ConfigError(
                "texts= pairs each text with one image: give image_column, no video_column and no layouts."
            )
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
            if not isinstance(text, str):
                raise ProbeError(f"The text of {name} is a {type(text).__name__}, not a string: {text!r:.80}.")
            samples.append(Sample.pair(name, _png_of(image, f"the image of {name}"), text))
        return cls(tuple(samples), max_text_tokens, matched=matched)

    @classmethod
    def from_samples(
        cls,
        samples: Iterable[Sequence[Any]],
        *,
        matched: bool = False,
        max_text_tokens: int = DEFAULT_MAX_TEXT_TOKENS,
    ) -> Probe:
        """Build a probe of any layout from images, videos and texts in memory. Images are stored as PNG, without loss.

        Args:
            samples: each a list of parts, in the order in which the model gets them: PIL images of at most 8 bits per
                channel, strings, and lists of PIL images of one size, the frames of a video.
            matched: whether the texts of each sample belong to its images, as ``vision_gain`` needs.
            max_text_tokens: longer texts are cut to this many tokens.

        Raises:
            ProbeError: no samples or none with an image, a part that is none of these, an unreadable image, a sample
                without a text.
            ConfigError: max_text_tokens is not a positive integer, or matched not a bool.

        Ranks: any. Ranks that call it with the same samples get the same probe.

        Example:
            >>> from mir_callback import Probe
            >>> from PIL import Image
            >>> black = Image.new("RGB", (8, 6))
            >>> probe = Probe.from_samples([["before", black, "and after", black, "it is dark"], ["a text alone"]])
            >>> [sample.describe() for sample in probe.samples]
            ['2 images and 3 texts', '1 text']
        """
        found = []
        sample: Any  # whatever the caller passed
        for index, sample in enumerate(samples):
            name = f"sample {index}"
            if not isinstance(sample, (tuple, list)):
                raise ProbeError(
                    f"{name} is a {type(sample).__name__}: {sample!r:.80}. Pass a list of its images and texts."
                )
            parts = (_part_of(part, f"part {number} of {name}") for number, part in enumerate(sample, start=1))
            found.append(Sample(name, tuple(parts)))
        return cls(tuple(found), max_text_tokens, matched=matched)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of images, texts, their order, max_text_tokens and the encoding rules; 16 hexadecimal digits."""
        only_pairs = all(sample.is_pair for sample in self.samples)
        rules = ENCODING if only_pairs else LAYOUTS_ENCODING
        digest = hashlib.sha256(f"{rules}; max_text_tokens={self.max_text_tokens}".encode())
        for sample in self.samples:
            if not only_pairs:
                digest.update(f"{len(sample.parts)} parts".encode())
            for part, kind in zip(sample.parts, sample.kinds, strict=True):
                files = contents_of(part)
                if not only_pairs:
                    digest.update(f"{kind} {len(files)}".encode())
                for content in files:
                    digest.update(hashlib.sha256(content).digest())
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
        stored = storage.StoredProbe(self.samples, self.max_text_tokens, self.fingerprint, self.matched)
        return storage.write(as_path(path, "path"), stored)

    @classmethod
    def load(cls, path: str | Path) -> Probe:
        """Read a probe that :meth:`save` wrote.

        Raises:
            ProbeError: there is no probe at ``path``, it is damaged, or it does not match its stored fingerprint.

        Ranks: any.
        """
        stored = storage.read(as_path(path, "path"))
        probe = cls(stored.samples, stored.max_text_tokens, matched=stored.matched)
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
        Sample.pair(name if name == text_name else f"{name} + {text_name}", image, text)
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


def _part_of(given: Any, what: str) -> Part:
    """A part from memory; a list is a video."""
    if isinstance(given, str):
        return given
    if isinstance(given, (list, tuple)):
        return Video(tuple(_png_of(frame, f"frame {number} of {what}") for number, frame in enumerate(given, start=1)))
    return Picture(_png_of(given, what, "neither a PIL image nor a string nor a list of PIL images"))


def _png_of(image: Any, what: str, else_: str = "not a PIL image") -> bytes:
    if not isinstance(image, Image.Image):
        raise ProbeError(
            f"{what[0].upper()}{what[1:]} is a {type(image).__name__}, {else_}: {image!r:.80}. Pass "
            "PIL.Image.open(path), or PIL.Image.fromarray(array)."
        )
    try:
        return to_png(image)
    except Exception as error:  # of a file that was opened and is damaged: any kind
        raise ProbeError(f"Could not read {what}: {type(error).__name__}: {error}. Replace it.") from error
