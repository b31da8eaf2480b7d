# SPDX-License-Identifier: Apache-2.0
"""Which values are comparable, and MIR of a run interpolated over steps, tokens, samples or time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

from mir_callback.analysis.load import Run, Series
from mir_callback.record import CIRCUMSTANCES, DEFINITION_FIELDS, DESCRIBED_FIELDS, EvalRecord, read_definition

Axis = Literal["step", "tokens", "samples", "time"]
AXES: tuple[Axis, ...] = get_args(Axis)

_MEANING = {
    "probe_fingerprint": "probe",
    "prompt": "around image and text",
    "tokens_fingerprint": "token ids of the probe",
    "root": "root",
    "text_positions": "positions that count as text",
    "text_only": "samples without an image",
    "vision_ids": "ids of vision tokens",
}


def keep_comparable(records: Sequence[EvalRecord]) -> tuple[list[EvalRecord], list[str]]:
    """A run's records with the same definition as the newest value, and a message about the others."""
    newest = next(record for record in reversed(records) if record.mir is not None)
    kept = [record for record in records if record.mir is None or _definition(record) == _definition(newest)]
    if len(kept) == len(records):
        return kept, []
    return kept, [
        f"skipped {len(records) - len(kept)} of {len(records)} evaluations, made with another probe, prompt, token ids "
        "or root than the last one, or with other positions or samples as text"
    ]


def find_mismatch(runs: Sequence[Run]) -> str | None:
    """Why the values of runs are not comparable; None if they are."""
    values: dict[str, dict[object, list[str]]] = {field: {} for field in DESCRIBED_FIELDS}
    for field in DESCRIBED_FIELDS:
        for run in runs:
            found = (read_definition(record, field) for record in run.measured)
            known = next((value for value in found if value is not None), None)
            if known is not None or field in DEFINITION_FIELDS:
                values[field].setdefault(known, []).append(run.name)
        if None in values[field] and len(runs) > 1:
            return f"{field} of {few(values[field][None])} is unknown, so it cannot be compared with other runs"
    for field, names in values.items():
        if len(names) > 1:
            differing = "; ".join(f"{value} in {few(found)}" for value, found in names.items())
            return f"{field} ({_MEANING[field]}) differs between the runs: {differing}"
    return None


def list_circumstances(runs: Sequence[Run]) -> list[str]:
    """Messages about differences of dtype, ranks or pixel inputs, which may change values slightly."""
    messages = []
    for field, meaning in CIRCUMSTANCES.items():
        values: dict[str, list[str]] = {}
        for run in runs:
            found = list(dict.fromkeys(str(r[field]) for r in run.measured if r[field] is not None))
            if found:
                values.setdefault(", then ".join(found), []).append(run.name)
        if len(values) > 1 or any(", then " in value for value in values):
            listed = "; ".join(f"{value} in {few(names)}" for value, names in values.items())
            messages.append(f"{meaning}: {listed}; this may explain a small part of a difference")
    return messages


def _definition(record: EvalRecord) -> tuple[object, ...]:
    return tuple(read_definition(record, field) for field in DEFINITION_FIELDS)


def few(names: Sequence[str]) -> str:
    """A list of names that is not too long for a message."""
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


@dataclass(frozen=True)
class Curve:
    """MIR of a run over an axis."""

    run: Run
    x: tuple[float, ...]  # strictly increasing
    records: tuple[EvalRecord, ...]  # the evaluation at each x
    clock: str  # the record field with the positions


@dataclass(frozen=True)
class Point:
    """MIR at one position of an axis."""

    mir: float
    se: float | None  # standard error over draws of the probe
    influences: np.ndarray | None  # of the probe's samples, (num_samples,) float64
    measured: bool  # False if interpolated
    step: float  # the optimizer step there, also interpolated
    scale_free_mir: float | None = None  # interpolated likewise; None if an evaluation beside it lacks it
    vision_gain: float | None = None


def build_curves(axis: Axis, runs: Sequence[Run]) -> list[Curve | None]:
    """The curves of runs over one axis; None for a run that has not recorded it.

    Time is `train_seconds` (training only, over restarts) if all runs have it, else `elapsed` (of the process,
    evaluations included).
    """
    if axis == "tokens":
        return [_build_curve(run, "tokens_seen", _between(run.tokens, run)) for run in runs]
    fields = {"step": ["step"], "samples": ["samples_seen"], "time": ["train_seconds", "elapsed"]}[axis]
    choices = [[_build_curve(run, name, [record[name] for record in run.measured]) for run in runs] for name in fields]
    return max(choices, key=lambda curves: sum(curve is not None for curve in curves))  # the first of equal ones


def find_common_range(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """The range of the axis that all curves cover; None if it is empty."""
    first, last = max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves)
    return (first, last) if first <= last else None


def interpolate(curve: Curve, x: float) -> Point:
    """A curve's value at a position it covers, by linear interpolation.

    Influences and standard error are interpolated in the same way; for the latter that is an upper bound.
    """
    right = bisect_left(curve.x, x)
    after = _point_at(curve.records[right])
    if curve.x[right] == x:
        return after
    before = _point_at(curve.records[right - 1])
    share = (x - curve.x[right - 1]) / (curve.x[right] - curve.x[right - 1])
    influences = None
    if before.influences is not None and after.influences is not None:
        if before.influences.shape == after.influences.shape:
            influences = (1 - share) * before.influences + share * after.influences
    mir, step = (1 - share) * before.mir + share * after.mir, (1 - share) * before.step + share * after.step
    se = _mix(before.se, after.se, share)
    scale_free_mir = _mix(before.scale_free_mir, after.scale_free_mir, share)
    gain = _mix(before.vision_gain, after.vision_gain, share)
    return Point(mir, se, influences, False, step, scale_free_mir, gain)


def _mix(before: float | None, after: float | None, share: float) -> float | None:
    return None if before is None or after is None else (1 - share) * before + share * after


def _point_at(record: EvalRecord) -> Point:
    assert record.mir is not None
    influences = None if record.influences is None else np.asarray(record.influences, dtype=float)
    opinions = record.scale_free_mir, record.vision_gain
    return Point(float(record.mir), record.mir_se, influences, True, record.step, *opinions)


def _between(points: Series, run: Run) -> list[float | None]:
    """A count (such as tokens) at each evaluation's step, interpolated; None after the last one known."""
    if not points:
        return [None] * len(run.measured)
    steps, counts = zip(*((0, 0.0), *(point for point in points if point[0] > 0)), strict=True)
    at = [record.step for record in run.measured]
    found = np.interp(at, steps, counts).tolist()
    return [count if step <= steps[-1] else None for step, count in zip(at, found, strict=True)]


def _build_curve(run: Run, clock: str, positions: Sequence[float | None]) -> Curve | None:
    """The curve over the known positions; None if there are none or they decrease."""
    known = [(float(x), record) for x, record in zip(positions, run.measured, strict=True) if x is not None]
    if not known or any(later[0] <= earlier[0] for earlier, later in pairwise(known)):
        return None
    return Curve(run, tuple(x for x, _ in known), tuple(record for _, record in known), clock)
