# SPDX-License-Identifier: Apache-2.0
"""Read the rows of an offline wandb run back from its `.wandb` file (the LevelDB log format, records in protobuf)."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_FILE_HEADER, _CHUNK_HEADER, _BLOCK = 7, 7, 32768
_FULL, _LAST = 1, 4


def rows(folder: Path) -> list[dict[str, Any]]:
    """The history rows of the only offline run below ``folder``, in the order they were logged."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    found = []
    for payload in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return found


def _records(data: bytes) -> Iterator[bytes]:
    position, whole = _FILE_HEADER, b""
    while position + _CHUNK_HEADER <= len(data):
        if _BLOCK - position % _BLOCK < _CHUNK_HEADER:  # the rest of a block too short for a header is padding
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + _CHUNK_HEADER])
        whole += data[position + _CHUNK_HEADER : position + _CHUNK_HEADER + length]
        position += _CHUNK_HEADER + length
        if kind in (_FULL, _LAST):
            yield whole
            whole = b""
