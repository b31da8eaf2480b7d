# SPDX-License-Identifier: Apache-2.0
"""Records from outside: what is damaged is left out and told, and what stays can be relied on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mir_callback.errors import HistoryError
from mir_callback.metric.frechet import ROOTS
from mir_callback.training.history import Record, parse_record

_MOST_STEPS = 2**53
_LISTED = 3  # findings of one kind that are told one by one


def read_records(path: str | Path) -> tuple[list[Record], list[str]]:
    """Read a history file of any origin.

    Unlike `read_history`, which a run is continued from, this leaves out damaged lines wherever they stand, and fields
    that cannot be what their name says. Steps are put in order; of several records of one step the last one counts.

    Args:
        path: the file, one JSON object a line.

    Returns:
        Records that have passed :func:`cleaned`, by step; and what was found wrong, in sentences.

    Raises:
        HistoryError: there is no such file, or it cannot be read.

    Ranks: any.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise HistoryError(f"{path} must be a readable history file, got {error.strerror or error}") from error
    records: list[Record] = []
    damaged: list[str] = []
    fields: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(cleaned(parse_record(line), fields))
        except (ValueError, RecursionError) as error:
            damaged.append(f"line {number} is left out, it is no record ({error}): {line.strip()!r:.60}")
    ordered, order = in_order(records)
    return ordered, [*_few(damaged, "damaged lines"), *_few(fields, "damaged fields"), *order]


def cleaned(record: Mapping[str, Any], told: list[str]) -> Record:
    """A record whose known fields are what their names say, or null.

    Args:
        record: with a whole `step` and a `mir` that is a number or None.
        told: gets a sentence for each field that is left out.

    Returns:
        A copy. Fields of other names are as they were.

    Raises:
        ValueError: its step is negative, or no number of steps that anyone takes.

    Ranks: pure.
    """
    if not 0 <= record["step"] < _MOST_STEPS:
        raise ValueError("its step is negative or beyond all runs")
    kept = dict(record)
    for field, value in record.items():
        rule = _RULES.get(field)
        if rule is None or value is None or rule[1](value):
            continue
        kept.pop(field)
        told.append(f"step {record['step']}: {field} is left out, it must be {rule[0]}, got {value!r:.60}")
    kept.setdefault("mir", None)
    influences = kept.get("influences")
    if influences is not None and kept.get("num_samples") not in (None, len(influences)):
        del kept["influences"]
        told.append(
            f"step {record['step']}: influences are left out, there are {len(influences)} of them for "
            f"{kept['num_samples']} samples"
        )
    return kept


def in_order(records: list[Record]) -> tuple[list[Record], list[str]]:
    """Records by step, the last one of each; and what had to be put right, in sentences. Ranks: pure."""
    told = []
    steps = [record["step"] for record in records]
    if steps != sorted(steps):
        told.append("its steps do not increase; they are put in order")
    by_step = {record["step"]: record for record in records}
    if len(by_step) < len(records):
        told.append(f"{len(records) - len(by_step)} records are left out, a later one has the same step")
    unknown = sorted({str(record["root"]) for record in records if record.get("root") not in (None, *ROOTS)})
    if unknown:
        told.append(
            f"root {', '.join(map(repr, unknown))} is unknown here (known: {', '.join(ROOTS)}); such values are like "
            "none of another root"
        )
    return [by_step[step] for step in sorted(by_step)], told


def noted_losses(records: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, float], ...]:
    """Training losses that evaluations have noted, (step, loss), each at the step it was logged at. Ranks: pure."""
    by_step = {
        record["step"] if record.get("loss_step") is None else record["loss_step"]: float(record["loss"])
        for record in records
        if record.get("loss") is not None
    }
    return tuple((step, by_step[step]) for step in sorted(by_step))


def is_number(value: object) -> bool:
    """Whether a value is a finite number. Ranks: pure."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _is_amount(value: object) -> bool:
    return is_number(value) and value >= 0  # type: ignore[operator]


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_truth(value: object) -> bool:
    return isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_number, value))


def _are_amounts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_amount, value))


def _are_lists(value: object) -> bool:
    return isinstance(value, dict) and all(map(_are_numbers, value.values()))


_Rule = tuple[str, Callable[[object], bool]]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("mir", "time"), ("a finite number", is_number)),
    **dict.fromkeys(
        ("epoch", "seconds", "mir_se", "elapsed", "train_seconds", "eval_seconds", "tokens_seen", "samples_seen")
        + ("peak_memory_bytes", "probe_loss", "expected_gain_se", "max_steps"),
        ("a number of at least 0", _is_amount),
    ),
    **dict.fromkeys(("loss", "mir_extrapolated", "expected_gain"), ("a finite number", is_number)),
    "would_stop": ("true or false", _is_truth),
    **dict.fromkeys(
        ("loss_step", "num_samples", "num_vision_tokens", "num_text_tokens", "world_size"),
        ("a whole number", _is_count),
    ),
    **dict.fromkeys(("per_layer", "per_layer_se"), ("a list of numbers of at least 0", _are_amounts)),
    "influences": ("a list of numbers", _are_numbers),
    "companions": ("an object of lists of numbers", _are_lists),
    **dict.fromkeys(
        ("root", "probe_fingerprint", "tokens_fingerprint", "pixels_fingerprint", "dtype", "verdict", "reason")
        + ("error",),
        ("text", _is_text),
    ),
}


def _few(findings: list[str], what: str) -> list[str]:
    """The first findings, and how many more there are."""
    more = len(findings) - _LISTED
    return findings if more <= 0 else [*findings[:_LISTED], f"{more} more {what} are left out"]
