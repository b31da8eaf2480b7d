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


def rows(folder: Path) -> list[dict[str, Any]]:
    """The history rows of the only offline run below ``folder``, in the order they were logged."""
    return [
        {_name(item): json.loads(item.value_json) for item in record.history.item}
        for record in finished(folder)
        if record.WhichOneof("record_type") == "history"
    ]


def settings(folder: Path) -> dict[str, Any]:
    """The run's config as it was updated while it ran; nested names joined by slashes."""
    return _updates(folder, "config")


def summary(folder: Path) -> dict[str, Any]:
    """The run's summary at its end; nested names joined by slashes."""
    return _updates(folder, "summary")


def axes(folder: Path) -> dict[str, str]:
    """Names of values, with `*`, and over what the run draws them."""
    metrics = [record.metric for record in finished(folder) if record.WhichOneof("record_type") == "metric"]
    return {metric.name or metric.glob_name: metric.step_metric for metric in metrics}


def alerts(folder: Path) -> list[Any]:
    """The alerts sent, with `title`, `text` and `level`."""
    return [record.alert for record in finished(folder) if record.WhichOneof("record_type") == "alert"]


def finished(folder: Path, timeout: float = 60.0) -> list[Any]:
    """All records of the only offline run below ``folder``.

    Another process writes the file, and may still be at it after `wandb.finish()`: its last record is waited for.
    """
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    end = time.monotonic() + timeout
    while not (records := _parsed(path)) or records[-1].WhichOneof("record_type") != "exit":
        assert time.monotonic() < end, f"{path} has no exit record after {timeout} s"
        time.sleep(0.1)
    return records


def _updates(folder: Path, kind: str) -> dict[str, Any]:
    found = {}
    for record in finished(folder):
        if record.WhichOneof("record_type") == kind:
            found.update({_name(item): json.loads(item.value_json) for item in getattr(record, kind).update})
    return found


def _name(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


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
