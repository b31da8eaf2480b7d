# SPDX-License-Identifier: Apache-2.0
"""Which values may be compared, over what (steps, tokens, samples, time), and a run's MIR at any point of it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

from mir_callback.analysis.load import Run, Series
from mir_callback.record import CIRCUMSTANCES, DEFINITION_FIELDS, EvalRecord

Axis = Literal["step", "tokens", "samples", "time"]
AXES: tuple[Axis, ...] = get_args(Axis)

_MEANING = {"probe_fingerprint": "probe", "tokens_fingerprint": "token ids of the probe", "root": "root"}


def keep_comparable(records: Sequence[EvalRecord]) -> tuple[list[EvalRecord], list[str]]:
    """The records that were made as the newest one with a value; what is left out is said.

    Failed evaluations stay, they have no value.

    Args:
        records: of one run, at least one with a value.

    Ranks: pure.
    """
    newest = next(record for record in reversed(records) if record.mir is not None)
    kept = [record for record in records if record.mir is None or _definition(record) == _definition(newest)]
    if len(kept) == len(records):
        return kept, []
    return kept, [
        f"{len(records) - len(kept)} of its {len(records)} evaluations are left out, they were made with another "
        "probe, token ids or root than the newest one"
    ]


def find_mismatch(runs: Sequence[Run]) -> str | None:
    """Why the values of runs are not alike, as a sentence; None if they are. Each run has one definition.

    Ranks: pure.
    """
    values: dict[str, dict[object, list[str]]] = {field: {} for field in DEFINITION_FIELDS}
    for field in DEFINITION_FIELDS:
        for run in runs:
            known = next((record[field] for record in run.measured if record[field] is not None), None)
            values[field].setdefault(known, []).append(run.name)
        if None in values[field] and len(runs) > 1:
            return f"{field} is not known of {_few(values[field][None])}, and so it cannot be compared with other runs"
    for field, names in values.items():
        if len(names) > 1:
            differing = "; ".join(f"{value} in {_few(found)}" for value, found in names.items())
            return f"{field} ({_MEANING[field]}) is not the same in all runs: {differing}"
    return None


def list_circumstances(runs: Sequence[Run]) -> list[str]:
    """What was otherwise in some runs without making their values another number, in sentences. Ranks: pure."""
    messages = []
    for field, meaning in CIRCUMSTANCES.items():
        values: dict[str, list[str]] = {}
        for run in runs:
            found = list(dict.fromkeys(str(r[field]) for r in run.measured if r[field] is not None))
            if found:
                values.setdefault(", then ".join(found), []).append(run.name)
        if len(values) > 1 or any(", then " in value for value in values):
            listed = "; ".join(f"{value} in {_few(names)}" for value, names in values.items())
            messages.append(f"{meaning}: {listed}; a small part of a difference may come from that")
    return messages


def _definition(record: EvalRecord) -> tuple[object, ...]:
    return tuple(record[field] for field in DEFINITION_FIELDS)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"


@dataclass(frozen=True)
class Curve:
    """MIR of a run over an axis.

    Attributes:
        run: whose.
        x: positions on the axis, strictly increasing.
        records: the evaluation at each of them.
        clock: the field of a record that the positions come from.
    """

    run: Run
    x: tuple[float, ...]
    records: tuple[EvalRecord, ...]
    clock: str


@dataclass(frozen=True)
class Point:
    """MIR at one position of an axis.

    Attributes:
        mir: the value, on a straight line between the evaluations on either side where none is at the position itself.
        se: standard error from the probe's samples, or None if the run does not know it.
        influences: the samples' influences behind it, (num_samples,) float64, or None.
        measured: whether there is an evaluation at the position itself.
        step: the optimizer step there, between two evaluations a broken one.
    """

    mir: float
    se: float | None
    influences: np.ndarray | None
    measured: bool
    step: float


def build_curves(axis: Axis, runs: Sequence[Run]) -> list[Curve | None]:
    """The curves of runs over one axis, all by the same clock; None for a run that does not know it.

    Time is that of training alone (`train_seconds`, carried over restarts) if all runs know it, else what has passed
    since their process began (`elapsed`), evaluations included. Ranks: pure.
    """
    if axis == "tokens":
        return [_build_curve(run, "tokens_seen", _between(run.tokens, run)) for run in runs]
    clocks = {"step": ("step",), "samples": ("samples_seen",), "time": ("train_seconds", "elapsed")}[axis]
    choices = [
        [_build_curve(run, clock, [record[clock] for record in run.measured]) for run in runs] for clock in clocks
    ]
    return max(choices, key=lambda curves: sum(curve is not None for curve in curves))  # the first of equal ones


def find_common_range(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """The part of the axis that all curves cover, None if there is no such part. Ranks: pure."""
    first, last = max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves)
    return (first, last) if first <= last else None


def interpolate(curve: Curve, x: float) -> Point:
    """A curve's value at a position it covers.

    The influences of the line's point are those of its ends in the same proportion, as MIR itself is; without them its
    standard error is that of ends whose errors are one and the same, which is the most it can be. Ranks: pure.
    """
    right = bisect_left(curve.x, x)
    after, psi_after = _value(curve.records[right]), _influences(curve.records[right])
    if curve.x[right] == x:
        return Point(after, curve.records[right].mir_se, psi_after, True, curve.records[right].step)
    before, psi_before = _value(curve.records[right - 1]), _influences(curve.records[right - 1])
    share = (x - curve.x[right - 1]) / (curve.x[right] - curve.x[right - 1])
    errors = [record.mir_se for record in curve.records[right - 1 : right + 1]]
    steps = [record.step for record in curve.records[right - 1 : right + 1]]
    se = None if errors[0] is None or errors[1] is None else (1 - share) * errors[0] + share * errors[1]
    influences = None
    if psi_before is not None and psi_after is not None and psi_before.shape == psi_after.shape:
        influences = (1 - share) * psi_before + share * psi_after
    mir, step = ((1 - share) * left + share * right for left, right in ((before, after), steps))
    return Point(mir, se, influences, False, step)


def _value(record: EvalRecord) -> float:
    assert record.mir is not None
    return float(record.mir)


def _influences(record: EvalRecord) -> np.ndarray | None:
    return None if record.influences is None else np.asarray(record.influences, dtype=float)


def _between(points: Series, run: Run) -> list[float | None]:
    """What was counted at each evaluation's step, on a line between the counts on either side of it."""
    if not points:
        return [None] * len(run.measured)
    steps, counts = zip(*((0, 0.0), *(point for point in points if point[0] > 0)), strict=True)
    return [
        float(np.interp(record.step, steps, counts)) if record.step <= steps[-1] else None for record in run.measured
    ]


def _build_curve(run: Run, clock: str, positions: Sequence[float | None]) -> Curve | None:
    """The curve over the positions that are known; None if there are none, or they go back."""
    known = [(float(x), record) for x, record in zip(positions, run.measured, strict=True) if x is not None]
    if not known or any(later[0] <= earlier[0] for earlier, later in pairwise(known)):
        return None
    return Curve(run, tuple(x for x, _ in known), tuple(record for _, record in known), clock)
