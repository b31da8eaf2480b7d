# SPDX-License-Identifier: Apache-2.0
"""A model by name: a folder as it is, a repository of the Hugging Face hub as its snapshot on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from mir_callback.errors import ConfigError

_SETTINGS = ["*.json", "*.model", "*.txt", "*.jinja"]
_SAFE, _PICKLED = "*.safetensors", ["pytorch_model*.bin", "adapter_model.bin", "mm_projector.bin"]


def is_local(name: str) -> bool:
    """Whether a name means a folder: there is one, or it cannot be a hub name. Ranks: any."""
    return os.path.exists(os.path.expanduser(name)) or name.startswith((".", "/", "~")) or name.count("/") > 1


def folder_of(name: str, *, weights: bool = True, what: str = "a model") -> Path:
    """The folder that a name means, fetched from the hub if it is a hub name and not on this machine.

    Args:
        name: a folder, or a repository such as ``llava-hf/llava-1.5-7b-hf``.
        weights: also fetch weights, safetensors if there are any.
        what: what it is, for the message.

    Raises:
        ConfigError: neither a folder nor a repository that can be fetched.

    Ranks: any; each machine fetches once.
    """
    if is_local(name):
        folder = Path(os.path.expanduser(name))  # pathlib's own refuses the name of a user it does not know
        if not folder.is_dir():
            why = "a file; name the folder it is in" if folder.exists() else "which does not exist"
            raise ConfigError(f"{what} must be a folder or a hub name, got {folder}, {why}")
        return folder
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*_SETTINGS, *([_SAFE] if weights else [])]))
        if weights and not any(folder.glob(_SAFE)):
            folder = Path(snapshot_download(name, allow_patterns=[*_SETTINGS, *_PICKLED]))
    except Exception as error:  # of the hub's client, of its connection, of the disk: any kind
        raise ConfigError(
            f"{what} must be a folder or a hub name, got {name}, which is no folder here and cannot be had from the "
            f"hub: {type(error).__name__}: {one_line(error)}"
        ) from error
    return folder


def has_processor(folder: Path) -> bool:
    """Whether a folder holds the settings of an image processor. Ranks: any."""
    return any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))


def one_line(error: BaseException, longest: int = 300) -> str:
    """The message of a foreign error, which may be a page long, as one line. Ranks: pure."""
    words = " ".join(str(error).split())
    return words if len(words) <= longest else f"{words[:longest]}..."


def base_of(folder: Path, given: str | None, named: object, where: str) -> Path:
    """The base model of a checkpoint that does not hold all of its weights.

    Args:
        folder: the checkpoint's.
        given: what the user says it is, which goes first.
        named: what the checkpoint says it is.
        where: the field of the checkpoint that says so.

    Returns:
        The base model's folder.

    Raises:
        ConfigError: nobody says, or it is not there.
    """
    name = given or named
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"{folder} holds only a part of a model, and {where} must name its base, got none; give --base"
        )
    try:
        return folder_of(name, what="the base model")
    except ConfigError as error:
        source = "--base" if given else f"{where} of {folder}"
        raise ConfigError(
            f"{folder} holds a part of a model, and the base that {source} names must be there: {error}; give --base "
            "the folder or hub name of the model it was trained from"
        ) from error
