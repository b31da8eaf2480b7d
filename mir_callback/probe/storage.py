# SPDX-License-Identifier: Apache-2.0
"""A probe on disk: `probe.json` with the texts and one image file per sample, in a folder or a .zip file."""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mir_callback.errors import ProbeError

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
    """Write a probe beside its place and rename it there. See :meth:`Probe.save`."""
    files = _files(entries, max_text_tokens, fingerprint)
    if path.exists() and not _is_probe(path):
        raise ProbeError(f"path must be free or hold a probe, got {path}; choose another path or remove what is there")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".zip":
            _write_zip(path, files)
        else:
            _write_folder(path, files)
    except OSError as error:
        raise ProbeError(
            f"path must be a place to write to, got {path}: {type(error).__name__}: {error.strerror}; choose another"
        ) from error
    return path


def read(path: Path) -> StoredProbe:
    """Read a probe file or folder. See :meth:`Probe.load`."""
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
    except zipfile.BadZipFile as error:
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


def _write_zip(path: Path, files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory(prefix=path.name, dir=path.parent) as beside:
        whole = Path(beside) / path.name
        with zipfile.ZipFile(whole, "w") as archive:
            for name, content in files.items():
                # A fixed date: the same probe is the same file, byte for byte.
                archive.writestr(zipfile.ZipInfo(name), content)
        _swap(whole, path)


def _write_folder(path: Path, files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory(prefix=path.name, dir=path.parent) as beside:
        whole = Path(beside) / path.name
        for name, content in files.items():
            (whole / name).parent.mkdir(parents=True, exist_ok=True)
            (whole / name).write_bytes(content)
        _swap(whole, path)


def _swap(new: Path, path: Path) -> None:
    """Put a finished file or folder in its place; the old one goes only after the new one stands."""
    if not path.is_dir() and not new.is_dir():
        os.replace(new, path)
        return
    old = new.with_name("replaced")
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)


def _image_member(name: object) -> str:
    """A member name that cannot lead out of the probe."""
    text = str(name)
    if not text.startswith("images/") or ".." in text:
        raise ValueError(f"image path {text!r} must lie in images/")
    return text


def _files(entries: Sequence[Entry], max_text_tokens: int, fingerprint: str) -> dict[str, bytes]:
    samples = []
    files = {}
    for index, (name, image, text) in enumerate(entries):
        member = f"images/{index:05d}.{_suffix(image)}"
        files[member] = image
        samples.append({"name": name, "image": member, "text": text})
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "fingerprint": fingerprint,
        "max_text_tokens": max_text_tokens,
        "samples": samples,
    }
    return {_MANIFEST: json.dumps(manifest, indent=1, ensure_ascii=False).encode(), **files}


def _suffix(image: bytes) -> str:
    with Image.open(io.BytesIO(image)) as opened:
        return (opened.format or "image").lower()


def _is_probe(path: Path) -> bool:
    try:
        read(path)
    except ProbeError:
        return False
    return True
