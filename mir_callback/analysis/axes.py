# SPDX-License-Identifier: Apache-2.0
"""Over what runs are compared (steps, tokens, samples, time), and a run's MIR at any point of it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np

from mir_callback.analysis.records import is_number
from mir_callback.analysis.runs import Run

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
