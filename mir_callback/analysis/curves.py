# SPDX-License-Identifier: Apache-2.0
"""Over what runs are compared (steps, tokens, samples, time), and a run's MIR at any point of it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from mir_callback.analysis.load import Run, is_number
from mir_callback.history import CIRCUMSTANCES, DEFINITION_FIELDS, Record

_MEANING = {
    "probe_fingerprint": "probe",
    "tokens_fingerprint": "token ids of the probe",
    "root": "root",
}


def comparable_records(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """The records that were made as the newest one with a value; what is left out is told.

    Failed evaluations stay, they have no value.

    Args:
        records: of one run, at least one with a value.

    Ranks: pure.
    """
    newest = next(record for record in reversed(records) if record["mir"] is not None)
    kept = [record for record in records if record["mir"] is None or _definition(record) == _definition(newest)]
    if len(kept) == len(records):
        return kept, []
    return kept, [
        f"{len(records) - len(kept)} of its {len(records)} evaluations are left out, they were made with another "
        "probe, token ids or root than the newest one"
    ]


def mismatch(runs: Sequence[Run]) -> str | None:
    """Why the values of runs are not alike, as a sentence; None if they are. Each run has one definition.

    Ranks: pure.
    """
    for field in DEFINITION_FIELDS:
        unknown = [run.name for run in runs if _of(run, field) is None]
        if unknown and len(runs) > 1:
            return f"{field} must be known of every run to compare them, got none for {_few(unknown)}"
    for field in DEFINITION_FIELDS:
        values: dict[object, list[str]] = {}
        for run in runs:
            values.setdefault(_of(run, field), []).append(run.name)
        if len(values) > 1:
            told = "; ".join(f"{value} in {_few(names)}" for value, names in values.items())
            return f"{field} ({_MEANING[field]}) must be the same in all runs, got {told}"
    return None


def other_circumstances(runs: Sequence[Run]) -> list[str]:
    """What was otherwise in some runs without making their values another number, in sentences. Ranks: pure."""
    told = []
    for field, meaning in CIRCUMSTANCES.items():
        values: dict[str, list[str]] = {}
        for run in runs:
            found = list(dict.fromkeys(str(r[field]) for r in run.measured if r.get(field) is not None))
            if found:
                values.setdefault(", then ".join(found), []).append(run.name)
        if len(values) > 1 or any(", then " in value for value in values):
            listed = "; ".join(f"{value} in {_few(names)}" for value, names in values.items())
            told.append(f"{meaning}: {listed}; a small part of a difference may come from that")
    return told


def _definition(record: Record) -> tuple[object, ...]:
    return tuple(record.get(field) for field in DEFINITION_FIELDS)


def _of(run: Run, field: str) -> object:
    return next((record[field] for record in run.measured if record.get(field) is not None), None)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


Axis = Literal["step", "tokens", "samples", "time"]
AXES: tuple[Axis, ...] = get_args(Axis)


@dataclass(frozen=True)
class Curve:
    """MIR of a run over an axis.

    Attributes:
        run: whose.
        places: where on the axis, strictly increasing.
        records: the evaluation at each of them.
        clock: which field the places come from.
    """

    run: Run
    places: tuple[float, ...]
    records: tuple[Mapping[str, Any], ...]
    clock: str


@dataclass(frozen=True)
class Point:
    """MIR at one place of an axis.

    Attributes:
        mir: the value, on a straight line between the evaluations on either side where none is at the place itself.
        se: standard error from the probe's samples, or None if the run does not know it.
        influences: the samples' influences behind it (num_samples,), or None.
        measured: whether there is an evaluation at the place itself.
        step: the optimizer step of the place, between two evaluations a broken one.
    """

    mir: float
    se: float | None
    influences: np.ndarray | None
    measured: bool
    step: float


def curves_over(axis: Axis, runs: Sequence[Run]) -> list[Curve | None]:
    """The curves of runs over one axis, all by the same clock; None for a run that does not know it.

    Time is that of training alone (`train_seconds`, carried over restarts) if all runs know it, else what has passed
    since their process began (`elapsed`), evaluations included.

    Ranks: pure.
    """
    if axis == "time":
        choices = [[_curve(run, clock, _field(run, clock)) for run in runs] for clock in ("train_seconds", "elapsed")]
        return max(choices, key=lambda curves: sum(curve is not None for curve in curves))  # the first of equal ones
    if axis == "tokens":
        return [_curve(run, "tokens_seen", _between(run.tokens, run)) for run in runs]
    clock = {"step": "step", "samples": "samples_seen"}[axis]
    return [_curve(run, clock, _field(run, clock)) for run in runs]


def common_range(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """The part of the axis that all curves cover, None if there is no such part. Ranks: pure."""
    first, last = max(curve.places[0] for curve in curves), min(curve.places[-1] for curve in curves)
    return (first, last) if first <= last else None


def value_at(curve: Curve, place: float) -> Point:
    """A curve's value at a place it covers.

    The influences of the line's point are those of its ends in the same proportion, as MIR itself is; without them its
    standard error is that of ends whose errors are one and the same, which is the most it can be.

    Ranks: pure.
    """
    right = bisect_left(curve.places, place)
    after = curve.records[right]
    if curve.places[right] == place:
        return Point(float(after["mir"]), after.get("mir_se"), _influences(after), True, after["step"])
    before = curve.records[right - 1]
    share = (place - curve.places[right - 1]) / (curve.places[right] - curve.places[right - 1])

    def blend(one: Any, other: Any) -> Any:
        return None if one is None or other is None else (1 - share) * one + share * other

    ends = _influences(before), _influences(after)
    alike = all(end is not None for end in ends) and ends[0].shape == ends[1].shape  # type: ignore[union-attr]
    return Point(
        blend(float(before["mir"]), float(after["mir"])),
        blend(before.get("mir_se"), after.get("mir_se")),
        blend(*ends) if alike else None,
        False,
        blend(before["step"], after["step"]),
    )


def _field(run: Run, name: str) -> list[float | None]:
    return [record.get(name) for record in run.measured]


def _between(points: Sequence[tuple[int, float]], run: Run) -> list[float | None]:
    """What was counted at each evaluation's step, on a line between the counts on either side of it."""
    if not points:
        return [None] * len(run.measured)
    steps, counts = zip(*((0, 0.0), *(point for point in points if point[0] > 0)), strict=True)
    return [
        float(np.interp(record["step"], steps, counts)) if record["step"] <= steps[-1] else None
        for record in run.measured
    ]


def _curve(run: Run, clock: str, places: Sequence[float | None]) -> Curve | None:
    """The curve over the places that are known; None if there are none, or they go back."""
    known = [(place, record) for place, record in zip(places, run.measured, strict=True) if is_number(place)]
    if not known or any(later[0] <= earlier[0] for earlier, later in pairwise(known)):  # type: ignore[operator]
        return None
    return Curve(run, tuple(float(place) for place, _ in known if place is not None), tuple(r for _, r in known), clock)


def _influences(record: Mapping[str, Any]) -> np.ndarray | None:
    values = record.get("influences")
    return None if values is None else np.asarray(values, dtype=float)
