# SPDX-License-Identifier: Apache-2.0
"""A probe on disk: `probe.json` with the texts and one image file per sample, in a folder or a .zip file."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mir_callback.errors import ProbeError
from mir_callback.fs import beside, fsync

# File name of a run's probe in its output folder.
RUN_PROBE = "mir_probe.zip"
_MANIFEST = "probe.json"
_FORMAT = "mir-callback probe"
_VERSION = 1

Entry = tuple[str, bytes, str]  # name, image bytes, text


@dataclass(frozen=True)
class StoredProbe:
    """Contents of a probe file or folder."""

    entries: list[Entry]
    max_text_tokens: int
    fingerprint: str


def write(path: Path, entries: Sequence[Entry], max_text_tokens: int, fingerprint: str) -> Path:
    """See :meth:`Probe.save`."""
    files = _files(entries, max_text_tokens, fingerprint)
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
        return _parse(path, lambda name: (path / name).read_bytes())
    if not path.exists():
        raise ProbeError(f"There is no probe at {path}. Check the path; Probe.save or mir probe --save write one.")
    if not path.is_file():
        raise ProbeError(f"{path} is not a saved probe, which is a folder or a .zip file.")
    try:
        with zipfile.ZipFile(path) as archive:
            return _parse(path, archive.read)
    except (OSError, zipfile.BadZipFile) as error:
        raise ProbeError(f"Could not read {path} as a saved probe, a folder or a .zip file: {error}.") from error


def _parse(path: Path, content: Callable[[str], bytes]) -> StoredProbe:
    try:
        manifest = json.loads(content(_MANIFEST))
        if manifest["format"] != _FORMAT or manifest["version"] != _VERSION:
            found = f"{manifest['format']!r} version {manifest['version']!r}"
            raise ValueError(f"it has format {found}, this version reads {_FORMAT!r} version {_VERSION}")
        entries = [(str(s["name"]), content(_image_member(s["image"])), str(s["text"])) for s in manifest["samples"]]
        return StoredProbe(entries, manifest["max_text_tokens"], str(manifest["fingerprint"]))
    # zipfile raises RuntimeError for encrypted members and NotImplementedError for unknown compression.
    except (KeyError, OSError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile) as error:
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


def _image_member(name: object) -> str:
    """The name of an image, refused if it would lead out of the probe."""
    text = str(name)
    if not text.startswith("images/") or ".." in text:
        raise ValueError(f"image path {text!r} is not in images/")
    return text


def _files(entries: Sequence[Entry], max_text_tokens: int, fingerprint: str) -> dict[str, bytes]:
    """Names and contents of the files of a probe."""
    images = {}
    for index, (_, image, _) in enumerate(entries):
        with Image.open(io.BytesIO(image)) as opened:
            images[f"images/{index:05d}.{(opened.format or 'image').lower()}"] = image
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "fingerprint": fingerprint,
        "max_text_tokens": max_text_tokens,
        "samples": [
            {"name": name, "image": member, "text": text}
            for (name, _, text), member in zip(entries, images, strict=True)
        ],
    }
    return {_MANIFEST: json.dumps(manifest, indent=1, ensure_ascii=False).encode(), **images}
