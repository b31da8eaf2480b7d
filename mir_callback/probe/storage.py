# SPDX-License-Identifier: Apache-2.0
"""A probe on disk: `probe.json` with the texts and a file for each image, in a folder or a .zip file."""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mir_callback.errors import ProbeError
from mir_callback.fs import beside, fsync
from mir_callback.probe.sample import IMAGE, TEXT, VIDEO, Part, Picture, Sample, Video, contents_of

# File name of a run's probe in its output folder.
RUN_PROBE = "mir_probe.zip"
_MANIFEST = "probe.json"
_FORMAT = "mir-callback probe"
_VERSION, _LAYOUTS_VERSION = 1, 2  # of probes of pairs, and of others
# What no honest probe reaches; a file made to exhaust memory does. Every rank keeps its probe in memory.
MAX_SAMPLES = 100_000  # and images
MAX_BYTES = 4 * 2**30  # of all its files
MAX_INDEX_BYTES = 64 * 2**20  # of probe.json, with the texts
MAX_INFLATION = 20  # times the size of a .zip file; ours are not compressed
_SMALL = 2**20  # bytes that a file of any size may unpack to


@dataclass(frozen=True)
class StoredProbe:
    """Contents of a probe file or folder."""

    samples: tuple[Sample, ...]
    max_text_tokens: int
    fingerprint: str
    matched: bool


def write(path: Path, probe: StoredProbe) -> Path:
    """See :meth:`Probe.save`."""
    files = _files(probe)
    try:
        if path.exists():
            read(path)
    except ProbeError as error:
        raise ProbeError(f"Will not overwrite {path}: it is not a probe. Choose another path or remove it.") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path) as new:
            (_write_zip if path.suffix == ".zip" else _write_folder)(new, files)
            if path.is_dir() or (path.exists() and new.is_dir()):  # os.replace only replaces a file by a file
                os.replace(path, new.with_name("replaced"))
            os.replace(new, path)
    except OSError as error:
        raise ProbeError(
            f"Could not write the probe to {path}: {error.strerror or error}. Choose another path."
        ) from error
    return path


def read(path: Path) -> StoredProbe:
    """See :meth:`Probe.load`."""
    if path.is_dir():
        if not (path / _MANIFEST).is_file():
            raise ProbeError(
                f"The folder {path} is not a saved probe: it has no {_MANIFEST}. To draw a probe from a folder of "
                "images and one of texts, use Probe.from_folders or mir probe --images DIR --texts DIR."
            )
        return _parse(path, lambda name, limit: _read_file(path / name, limit))
    if not path.exists():
        raise ProbeError(f"There is no probe at {path}. Check the path; Probe.save or mir probe --save write one.")
    if not path.is_file():
        raise ProbeError(f"{path} is not a saved probe, which is a folder or a .zip file.")
    try:
        with zipfile.ZipFile(path) as archive:
            _require_sane(path, archive)
            return _parse(path, lambda name, limit: _read_member(archive, name, limit))
    except (OSError, zipfile.BadZipFile) as error:
        raise ProbeError(f"Could not read {path} as a saved probe, a folder or a .zip file: {error}.") from error


def _require_sane(path: Path, archive: zipfile.ZipFile) -> None:
    """ProbeError, before anything is unpacked, if it would be far more than its file."""
    members, size = archive.infolist(), path.stat().st_size
    total = sum(member.file_size for member in members)
    if len(members) > 2 * MAX_SAMPLES:
        raise ProbeError(f"{path} has {len(members)} files; a saved probe has at most {MAX_SAMPLES} samples.")
    if total > max(_SMALL, MAX_INFLATION * size):
        raise ProbeError(
            f"{path} has {size} bytes and would unpack to {total}, more than {MAX_INFLATION} times as many. Probe.save "
            "writes no such file; if you trust it, unpack it and pass the folder."
        )


def _read_member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """A file of an archive, of which no more is unpacked than the size it declares."""
    member = archive.getinfo(name)
    _require_size(name, member.file_size, limit)
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without a limit
        raise ValueError(f"{name} is compressed with method {member.compress_type}, not stored or deflated")
    with archive.open(member) as file:
        return file.read(member.file_size)


def _read_file(path: Path, limit: int) -> bytes:
    if not path.is_file():  # a device would not end
        raise FileNotFoundError(f"there is no file {path}")
    _require_size(path.name, path.stat().st_size, limit)
    return path.read_bytes()


def _require_size(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise ValueError(
            f"{name} has {size} bytes, at most {limit} are read ({MAX_INDEX_BYTES} of texts, {MAX_BYTES} of images)"
        )


def _parse(path: Path, content: Callable[[str, int], bytes]) -> StoredProbe:
    """Read a probe from its files, which ``content`` reads by name, up to a number of bytes."""
    try:
        manifest = json.loads(content(_MANIFEST, MAX_INDEX_BYTES))
        if manifest["format"] != _FORMAT or manifest["version"] not in (_VERSION, _LAYOUTS_VERSION):
            found = f"{manifest['format']!r} version {manifest['version']!r}"
            raise ValueError(f"it has format {found}, this version reads {_FORMAT!r} up to {_LAYOUTS_VERSION}")
        samples = manifest["samples"]
        if len(samples) > MAX_SAMPLES:
            raise ValueError(f"it has {len(samples)} samples, more than {MAX_SAMPLES}")
        layouts = [_parts_in(sample) for sample in samples]
        images = [member for parts in layouts for kind, members in parts if kind != TEXT for member in members]
        if len({*images}) < len(images):
            raise ValueError(
                f"{len(samples)} samples share {len({*images})} images, each of {len(images)} should have its own"
            )
        if len(images) > MAX_SAMPLES:
            raise ValueError(f"it has {len(images)} images, more than {MAX_SAMPLES}")
        files, left = dict[str, bytes](), MAX_BYTES
        for member in images:
            files[member] = content(member, left)
            left -= len(files[member])
        read = tuple(
            Sample(str(sample["name"]), tuple(_part_of(kind, values, files) for kind, values in parts))
            for sample, parts in zip(samples, layouts, strict=True)
        )
        matched = manifest.get("matched", False)  # older files do not say
        if not isinstance(matched, bool):
            raise ValueError(f"matched is {matched!r}, not true or false")
        return StoredProbe(read, manifest["max_text_tokens"], str(manifest["fingerprint"]), matched)
    # zipfile raises RuntimeError for encrypted members and NotImplementedError for unknown compression.
    except (
        *(AttributeError, KeyError, TypeError, ValueError),
        *(OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error),
    ) as error:
        raise ProbeError(
            f"Could not read the probe {path}: {type(error).__name__}: {error}. Save it again, with this version."
        ) from error


def _write_zip(path: Path, files: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # with a fixed date, so that equal probes are equal files
    fsync(path)


def _write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
        fsync(path / name)


def _parts_in(sample: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Kind of each part of a sample in probe.json, and its text or the names of its images."""
    if "parts" not in sample:
        return [(IMAGE, [_image_member(sample["image"])]), (TEXT, [str(sample["text"])])]
    found = []
    for part in sample["parts"]:
        ((kind, value),) = part.items()
        if kind not in (TEXT, IMAGE, VIDEO) or isinstance(value, list) != (kind == VIDEO):
            raise ValueError(f"a part is {str(part):.80}, not a text, an image or a video")
        members = value if isinstance(value, list) else [value]
        found.append((kind, [str(value)] if kind == TEXT else [_image_member(member) for member in members]))
    return found


def _part_of(kind: str, values: list[str], files: Mapping[str, bytes]) -> Part:
    if kind == TEXT:
        return values[0]
    contents = tuple(files[value] for value in values)
    return Video(contents) if kind == VIDEO else Picture(contents[0])


def _image_member(name: object) -> str:
    """The name of an image, refused if it would lead out of the probe."""
    text = str(name)
    if not text.startswith("images/") or ".." in text:
        raise ValueError(f"image path {text!r} is not in images/")
    return text


def _files(probe: StoredProbe) -> dict[str, bytes]:
    """Names and contents of the files of a probe."""
    images: dict[str, bytes] = {}

    def add(image: bytes) -> str:
        with Image.open(io.BytesIO(image)) as opened:
            member = f"images/{len(images):05d}.{(opened.format or 'image').lower()}"
        images[member] = image
        return member

    def entry(sample: Sample) -> dict[str, Any]:
        if sample.is_pair:
            return {"name": sample.name, "image": add(contents_of(sample.parts[0])[0]), "text": sample.text}
        parts: list[dict[str, Any]] = []
        for part, kind in zip(sample.parts, sample.kinds, strict=True):
            members = [part] if isinstance(part, str) else [add(image) for image in contents_of(part)]
            parts.append({kind: members if kind == VIDEO else members[0]})
        return {"name": sample.name, "parts": parts}

    manifest = {
        "format": _FORMAT,
        "version": _VERSION if all(sample.is_pair for sample in probe.samples) else _LAYOUTS_VERSION,
        "fingerprint": probe.fingerprint,
        "max_text_tokens": probe.max_text_tokens,
        "matched": probe.matched,
        "samples": [entry(sample) for sample in probe.samples],
    }
    # Names of files may be no valid text; so escaped, JSON reads them back.
    texts = json.dumps(manifest, indent=1, ensure_ascii=False).encode(errors="backslashreplace")
    total = sum(map(len, images.values()))
    if max(len(probe.samples), len(images)) > MAX_SAMPLES or len(texts) > MAX_INDEX_BYTES or total > MAX_BYTES:
        raise ProbeError(
            f"The probe is too large to be saved: {len(probe.samples)} samples and {len(images)} images (at most "
            f"{MAX_SAMPLES} of each), {total} bytes of images (at most {MAX_BYTES}), {len(texts)} of texts (at most "
            f"{MAX_INDEX_BYTES}). Draw fewer samples."
        )
    return {_MANIFEST: texts, **images}
