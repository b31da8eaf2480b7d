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

# Where a run keeps its probe, in its output folder.
RUN_PROBE = "mir_probe.zip"
_MANIFEST = "probe.json"
_FORMAT = "mir-callback probe"
_VERSION = 1

Entry = tuple[str, bytes, str]  # name, image bytes, text


@dataclass(frozen=True)
class StoredProbe:
    """What a probe file or folder holds."""

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
        raise ProbeError(
            f"path must be free or hold a probe, got {path}; choose another path or remove what is there"
        ) from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside(path) as new:
            (_write_zip if path.suffix == ".zip" else _write_folder)(new, files)
            if path.is_dir() or (path.exists() and new.is_dir()):  # only a file takes a file's place in one go
                os.replace(path, new.with_name("replaced"))
            os.replace(new, path)
    except OSError as error:
        raise ProbeError(
            f"path must be a place to write to, got {path}: {type(error).__name__}: {error.strerror}; choose another"
        ) from error
    return path


def read(path: Path) -> StoredProbe:
    """See :meth:`Probe.load`."""
    if path.is_dir():
        if not (path / _MANIFEST).is_file():
            raise ProbeError(
                f"path must be a saved probe, got {path}, a folder without {_MANIFEST}; to draw a probe from folders "
                "see Probe.from_folders, or mir probe --images DIR --texts DIR"
            )
        return _parse(path, lambda name: (path / name).read_bytes())
    if not path.exists():
        raise ProbeError(f"path must be a saved probe, got {path}, which does not exist; see Probe.save")
    if not path.is_file():
        raise ProbeError(f"path must be a saved probe (a folder or a .zip), got {path}, which is neither")
    try:
        with zipfile.ZipFile(path) as archive:
            return _parse(path, archive.read)
    except (OSError, zipfile.BadZipFile) as error:
        raise ProbeError(f"path must be a saved probe (a folder or a .zip), got {path}: {error}") from error


def _parse(path: Path, content: Callable[[str], bytes]) -> StoredProbe:
    try:
        manifest = json.loads(content(_MANIFEST))
        if manifest["format"] != _FORMAT or manifest["version"] != _VERSION:
            raise ValueError(f"format {manifest['format']!r} version {manifest['version']!r}")
        entries = [(str(s["name"]), content(_image_member(s["image"])), str(s["text"])) for s in manifest["samples"]]
        return StoredProbe(entries, manifest["max_text_tokens"], str(manifest["fingerprint"]))
    # zipfile raises RuntimeError for encrypted members and NotImplementedError for unknown compression.
    except (KeyError, OSError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ProbeError(
            f"path must be a whole probe of version {_VERSION}, got {path}: {type(error).__name__}: {error}; "
            "save the probe anew"
        ) from error


def _write_zip(path: Path, files: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # of a fixed date: the same probe is the same file
    fsync(path)


def _write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
        fsync(path / name)


def _image_member(name: object) -> str:
    """A member name that cannot lead out of the probe."""
    text = str(name)
    if not text.startswith("images/") or ".." in text:
        raise ValueError(f"image path {text!r} must lie in images/")
    return text


def _files(entries: Sequence[Entry], max_text_tokens: int, fingerprint: str) -> dict[str, bytes]:
    """Names and contents of what a probe is stored as."""
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
