# SPDX-License-Identifier: Apache-2.0
"""One sample of a probe: images, videos and texts, in the order in which the model gets them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from PIL import Image, UnidentifiedImageError

from mir_callback.errors import ProbeError

MAX_PIXELS = 89_478_485  # of one image or frame; where Pillow warns of a decompression bomb
MAX_SAMPLE_PIXELS = 4 * MAX_PIXELS  # of all images and frames of a sample, which are in memory together
# Pillow opens more, some of it with other programs (EPS) or without a limit (FITS).
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
TEXT, IMAGE, VIDEO = "text", "image", "video"  # kinds of parts


@dataclass(frozen=True)
class Picture:
    """An image of a sample.

    Attributes:
        data: bytes of an encoded image file (PNG, JPEG, ...).
    """

    data: bytes = field(repr=False)

    def open(self, name: str = "an image") -> Image.Image:
        """Decode the whole image, as RGB.

        Args:
            name: what messages call it.

        Raises:
            ProbeError: the bytes are not a whole image of one of FORMATS, it has more than MAX_PIXELS pixels, or more
                than 8 bits per channel.

        Ranks: pure.
        """
        with opened(self.data, name) as image:
            return to_rgb(image)


@dataclass(frozen=True)
class Video:
    """A video of a sample.

    Attributes:
        frames: bytes of encoded image files, one a frame, all of the same size.
    """

    frames: tuple[bytes, ...] = field(repr=False)

    def __post_init__(self) -> None:
        """Accept any sequence of frames."""
        object.__setattr__(self, "frames", tuple(self.frames))

    def open(self, name: str = "a video") -> list[Image.Image]:
        """Decode all frames, as RGB; arguments and errors as of :meth:`Picture.open`. Ranks: pure."""
        return list(_open_each(self, name))


Part = str | Picture | Video


@dataclass(frozen=True)
class Sample:
    """Images, videos and texts in the order in which the model gets them; usually one image, then one text.

    Attributes:
        name: where it came from, for messages only; not part of the fingerprint.
        parts: strings, :class:`Picture` and :class:`Video`.

    Raises:
        ProbeError: a part is none of these.

    Example:
        >>> from mir_callback import Probe
        >>> from PIL import Image
        >>> sample = Probe.from_pairs([(Image.new("RGB", (8, 6)), "a black rectangle")]).samples[0]
        >>> sample.name, sample.kinds, sample.text, sample.open_image().size
        ('pair 0', ('image', 'text'), 'a black rectangle', (8, 6))
    """

    name: str
    parts: tuple[Part, ...] = field(repr=False)

    def __post_init__(self) -> None:
        """Check the kinds of parts; what is in them is checked by :meth:`check`."""
        parts: Any = self.parts
        if not isinstance(parts, (tuple, list)):
            raise ProbeError(f"The parts of {self.name} are a {type(parts).__name__}, not a tuple. See Sample.pair.")
        for number, part in enumerate(parts, start=1):
            if not isinstance(part, (str, Picture, Video)):
                raise ProbeError(
                    f"Part {number} of {self.name} is a {type(part).__name__}, not a string, a Picture or a Video."
                )
        object.__setattr__(self, "parts", tuple(parts))

    @classmethod
    def pair(cls, name: str, image: bytes, text: str) -> Sample:
        """One image, from the bytes of its file, and the text that follows it. Ranks: pure."""
        return cls(name, (Picture(image), text))

    @property
    def kinds(self) -> tuple[str, ...]:
        """The layout of the sample: "image", "video" or "text" for each of its parts."""
        return tuple(map(_kind, self.parts))

    @property
    def is_pair(self) -> bool:
        """Whether it is one image, then one text."""
        return self.kinds == (IMAGE, TEXT)

    @property
    def has_vision(self) -> bool:
        """Whether it has an image or a video."""
        return any(kind != TEXT for kind in self.kinds)

    @property
    def num_images(self) -> int:
        """Its images and the frames of its videos."""
        return sum(len(contents_of(part)) for part in self.parts if not isinstance(part, str))

    @property
    def texts(self) -> tuple[str, ...]:
        """Its texts, in order."""
        return tuple(part for part in self.parts if isinstance(part, str))

    @property
    def text(self) -> str:
        """The text of a pair; ProbeError if the sample is none."""
        self._require_pair()
        return self.texts[0]

    def open_image(self) -> Image.Image:
        """Decode the image of a pair, as RGB.

        Raises:
            ProbeError: the sample is no pair; or as of :meth:`Picture.open`.

        Ranks: pure.
        """
        self._require_pair()
        return next(self.open_images())

    def open_parts(self) -> list[str | Image.Image | list[Image.Image]]:
        """Its parts with images decoded, those of a video as a list of frames; errors name the sample. Ranks: pure."""
        return [part if isinstance(part, str) else part.open(name) for part, name in self._named_parts()]

    def open_images(self) -> Iterator[Image.Image]:
        """Its images and the frames of its videos, decoded one by one; errors name the sample. Ranks: pure."""
        for part, name in self._named_parts():
            if not isinstance(part, str):
                yield from _open_each(part, name)

    def check(self) -> None:
        """ProbeError unless all of it can be read, and there is a text. Ranks: pure."""
        if not any(text.strip() for text in self.texts):
            raise ProbeError(f"The text of {self.name} is empty. Replace or remove it.")
        for text in self.texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ProbeError(f"The text of {self.name} is not valid Unicode: {error}. Repair it.") from error
        pixels = 0
        for part, name in self._named_parts():
            sizes: dict[tuple[int, int], None] = {}
            for image in () if isinstance(part, str) else _open_each(part, name):
                sizes[image.size] = None
                pixels += image.width * image.height
                if pixels > MAX_SAMPLE_PIXELS:
                    raise ProbeError(
                        f"The images of {self.name} have more than {MAX_SAMPLE_PIXELS} pixels together. Scale them "
                        "down, or take fewer."
                    )
            if isinstance(part, Video) and len(sizes) != 1:
                found = ", ".join(f"{width} x {height}" for width, height in sizes) or "there are none"
                raise ProbeError(f"The frames of {name} need one size in common: {found}. Make them alike.")

    def describe(self) -> str:
        """What it holds, in words, such as "1 image, then 1 text". Ranks: pure."""
        runs = [(kind, len(list(group))) for kind, group in groupby(self.kinds)]
        if len(runs) > 2:
            counts = Counter(self.kinds)
            return " and ".join(_count(kind, counts[kind]) for kind in (IMAGE, VIDEO, TEXT) if counts[kind])
        return ", then ".join(_count(*run) for run in runs) or "nothing"

    def _require_pair(self) -> None:
        if not self.is_pair:
            raise ProbeError(
                f"In the probe, {self.name} holds {self.describe()}; this adapter takes one image, then one text. Draw "
                "other samples, or use an adapter that takes such ones."
            )

    def _named_parts(self) -> Iterator[tuple[Part, str]]:
        """Each part, and what messages call it."""
        several, seen = Counter(self.kinds), Counter[str]()
        for part, kind in zip(self.parts, self.kinds, strict=True):
            seen[kind] += 1
            yield part, f"{f'{kind} {seen[kind]}' if several[kind] > 1 else f'the {kind}'} of {self.name}"


def _kind(part: Part) -> str:
    return TEXT if isinstance(part, str) else IMAGE if isinstance(part, Picture) else VIDEO


def _count(kind: str, number: int) -> str:
    return f"{number} {kind}" if number == 1 else f"{number} {kind}s"


@contextmanager
def opened(data: bytes, name: str) -> Iterator[Image.Image]:
    """An image file, open; ProbeErrors, which begin with ``name``, if it is not allowed or reading it fails inside."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                size = f"{image.width} x {image.height} = {image.width * image.height} pixels"
                raise Image.DecompressionBombError(f"it has {size}.")
            if image.format not in FORMATS:
                raise ValueError(f"its format is {image.format}, not one of {', '.join(FORMATS)}")
            yield image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ProbeError(
            f"{name[0].upper()}{name[1:]} is too large (at most {MAX_PIXELS} pixels): {error} Scale it down or remove "
            "it."
        ) from error
    except Exception as error:  # Pillow raises many kinds, from OSError to struct.error, for damaged files
        # The message of an UnidentifiedImageError only names an object in memory.
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not a known image format" if unknown else f"{type(error).__name__}: {error}"
        size = f" ({len(data)} bytes)" if isinstance(data, bytes) else ""
        raise ProbeError(f"Could not decode {name}{size}: {reason}. Replace or remove it.") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as RGB; ValueError if it has more than 8 bits per channel. Ranks: pure."""
    if image.mode.startswith("I") or image.mode == "F":
        raise ValueError(f"mode {image.mode} has more than 8 bits per channel, which RGB would clip")
    return image.convert("RGB")


def to_png(image: Image.Image) -> bytes:
    """The image as a PNG file, without loss; errors as of :func:`to_rgb` and of Pillow. Ranks: pure."""
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, format="PNG")
    return buffer.getvalue()


def measured_samples(samples: Sequence[Sample], text_only: bool = False) -> list[int]:
    """Places of the samples that are measured: those with an image or a video, and with ``text_only`` the others too.

    Ranks: pure.
    """
    return [place for place, sample in enumerate(samples) if text_only or sample.has_vision]


def contents_of(part: Part) -> tuple[bytes, ...]:
    """What a part consists of: its encoded text, or the files of its images. Ranks: pure."""
    if isinstance(part, str):
        return (part.encode(),)
    return (part.data,) if isinstance(part, Picture) else part.frames


def _open_each(part: Picture | Video, name: str) -> Iterator[Image.Image]:
    if isinstance(part, Picture):
        yield part.open(name)
        return
    for number, data in enumerate(part.frames, start=1):
        yield Picture(data).open(f"frame {number} of {name}")
