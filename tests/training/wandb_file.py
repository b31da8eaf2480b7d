# SPDX-License-Identifier: Apache-2.0
"""Read the rows of an offline wandb run back from its `.wandb` file (the LevelDB log format, records in protobuf)."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_FILE_HEADER, _CHUNK_HEADER, _BLOCK = 7, 7, 32768
_FULL, _LAST = 1, 4


def rows(folder: Path, timeout: float = 60.0) -> list[dict[str, Any]]:
    """The history rows of the only offline run below ``folder``, in the order they were logged.

    Another process writes the file, and may still be at it after `wandb.finish()`: its last record is waited for.
    """
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    end = time.monotonic() + timeout
    while not (records := _parsed(path)) or records[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < end, f"{path} has no exit record after {timeout} s"
        time.sleep(0.1)
    found = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return found


def _parsed(path: Path) -> list[Any]:
    records = []
    for payload in _payloads(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        records.append(record)
    return records


def _payloads(data: bytes) -> Iterator[bytes]:
    position, whole = _FILE_HEADER, b""
    while position + _CHUNK_HEADER <= len(data):
        if _BLOCK - position % _BLOCK < _CHUNK_HEADER:  # the rest of a block too short for a header is padding
            position += _BLOCK - position % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + _CHUNK_HEADER])
        if position + _CHUNK_HEADER + length > len(data):  # still being written
            return
        whole += data[position + _CHUNK_HEADER : position + _CHUNK_HEADER + length]
        position += _CHUNK_HEADER + length
        if kind in (_FULL, _LAST):
            yield whole
            whole = b""
