# SPDX-License-Identifier: Apache-2.0
"""The file of a wandb run, offline or not: LevelDB's log format, with wandb's own header, and a protobuf in each entry.

wandb writes this file in another process while training runs, and offers no reader of it.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mir_callback.analysis.records import cleaned, in_order
from mir_callback.errors import ConfigError, HistoryError
from mir_callback.training.history import Record

_FILE_HEADER = b":W&B"
_FILE_HEADER_SIZE, _CHUNK_HEADER, _BLOCK = 7, 7, 32768
_LAYER = re.compile(r"train/mir_layer/\d+")
_FIELDS = {
    "train/epoch": "epoch",
    "train/mir_seconds": "seconds",
    "train/mir_se": "mir_se",
    "_runtime": "elapsed",
    "_timestamp": "time",
}
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass(frozen=True)
class WandbRun:
    """What a wandb run has logged.

    Attributes:
        rows: the logged values by name, in the order they were logged; nested names are joined by slashes.
        config: the run's settings by name, the latest of each; nested names are joined by slashes.
        name: what the run is called, or "".
        problems: what could not be read, in sentences.
    """

    rows: tuple[dict[str, Any], ...]
    config: dict[str, Any]
    name: str
    problems: tuple[str, ...]


def read_wandb(path: str | Path) -> WandbRun:
    """Read a `.wandb` file.

    One that is still being written, or was left by a killed process, is read as far as it goes.

    Raises:
        ConfigError: wandb is not installed.
        HistoryError: there is no such file, or it is none of wandb's.

    Ranks: any.
    """
    try:
        from wandb.proto import wandb_internal_pb2
    except ImportError as error:
        raise ConfigError(f"{path} needs wandb to be read, got {error}; pip install wandb") from error
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise HistoryError(f"{path} must be a readable .wandb file, got {error.strerror or error}") from error
    if not data.startswith(_FILE_HEADER):
        raise HistoryError(f"{path} must begin with wandb's mark, got {data[:7]!r}; is it the file of a wandb run?")
    entry: Any = getattr(wandb_internal_pb2, "Record")  # noqa: B009  (made when the module is imported)
    rows: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    name, damaged = "", 0
    for payload in _payloads(data):
        record = entry()
        try:
            if payload is None:
                raise ValueError("damaged chunk")
            record.ParseFromString(payload)
        except Exception:  # protobuf's own error class moves between its versions
            damaged += 1
            continue
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows.append(_items(record.history.item))
        elif kind == "config":
            config.update(_flat(_items(record.config.update)))
        elif kind == "run":
            config.update(_flat(_items(record.run.config.update)))
            name = record.run.display_name or name
    problems = (f"{damaged} damaged entries of the wandb file are left out",) if damaged else ()
    return WandbRun(tuple(rows), config, name, problems)


def records_of(run: WandbRun) -> tuple[list[Record], list[str]]:
    """The evaluations among what a run has logged, as the lines of a history have them.

    `elapsed` is wandb's clock, which starts with the run; how values were made is taken from the run's settings.

    Returns:
        Records as `read_records` gives them, and what was found wrong, in sentences. Failed evaluations have left
        nothing in wandb.

    Ranks: any.
    """
    how = {name.removeprefix("mir/"): value for name, value in run.config.items() if name.startswith("mir/")}
    records: list[Record] = []
    told: list[str] = []
    for row in run.rows:
        step, mir = row.get("train/global_step"), row.get("train/mir")
        if mir is None or type(step) is not int:
            continue
        layers = sorted((name for name in row if _LAYER.fullmatch(name)), key=lambda name: int(name.rpartition("/")[2]))
        record = {"step": step, "mir": mir, "per_layer": [row[name] for name in layers] or None, **how}
        record |= {field: row[name] for name, field in _FIELDS.items() if name in row}
        try:
            records.append(cleaned(record, told))
        except ValueError as error:
            told.append(f"a row of step {step} is left out: {error}")
    ordered, order = in_order(records)
    return ordered, [*told, *order]


def _items(items: Any) -> dict[str, Any]:
    """Values by name; those that are no JSON of ours are left out, as they are none of ours."""
    found = {}
    for item in items:
        try:
            found[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        except ValueError:
            continue
    return found


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Nested objects as one, names joined by slashes."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat.update(_flat(value, f"{before}{name}/") if isinstance(value, dict) else {f"{before}{name}": value})
    return flat


def _payloads(data: bytes) -> Iterator[bytes | None]:
    """Whole entries; None for each that is damaged. A torn end is passed over."""
    position, whole, broken = _FILE_HEADER_SIZE, b"", False
    while position + _CHUNK_HEADER <= len(data):
        if _BLOCK - position % _BLOCK < _CHUNK_HEADER:  # the rest of a block too short for a header is padding
            position += _BLOCK - position % _BLOCK
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + _CHUNK_HEADER])
        end = position + _CHUNK_HEADER + length
        content = data[position + _CHUNK_HEADER : end]
        if (
            end > len(data)
            or end > position - position % _BLOCK + _BLOCK
            or kind not in (_FULL, _FIRST, _MIDDLE, _LAST)
        ):
            if position - position % _BLOCK + _BLOCK >= len(data):
                return  # the last block: still being written
            yield None  # the length cannot be trusted, so go on with the next block
            position += _BLOCK - position % _BLOCK
            whole, broken = b"", True
            continue
        sound = zlib.crc32(content, zlib.crc32(bytes([kind]))) == checksum  # unmasked, and not LevelDB's polynomial
        position = end
        if kind in (_FULL, _FIRST):
            whole, broken = b"", False
        whole, broken = whole + content, broken or not sound
        if kind in (_FULL, _LAST):
            yield None if broken else whole
            whole, broken = b"", False
