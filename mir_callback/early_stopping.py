# SPDX-License-Identifier: Apache-2.0
"""Has MIR stopped moving? A pure rule from history to verdict.

What counts is what going on would bring: a robust line through the last evaluations says how far MIR would still fall
within a horizon, a part of the run, and its standard error how well that is known. The run is on its plateau only if
that gain is small *and known to be small*. "No new best for P evaluations" would not do: MIR rises at first while a
fresh projector's outputs grow, and only then falls. Reasons and measured rates: docs/stopping.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mir_callback.errors import ConfigError
from mir_callback.record import EvalRecord, as_records

VerdictKind = Literal["going on", "plateau", "rising", "too noisy", "no data"]


@dataclass(frozen=True)
class Verdict:
    """What a rule made of a history.

    Attributes:
        kind: "going on", "plateau", "rising", "too noisy" or "no data".
        reason: the figures behind it, as a sentence.
        expected_gain: by how much MIR would still fall over the rule's horizon, below zero where it rises; None where
            the rule has no estimate.
        expected_gain_se: its standard error.
        observed: the rule only watches: a plateau is told, and training goes on.
    """

    kind: VerdictKind
    reason: str
    expected_gain: float | None = None
    expected_gain_se: float | None = None
    observed: bool = False

    @property
    def stop(self) -> bool:
        """Whether training should stop."""
        return self.kind == "plateau" and not self.observed

    @property
    def would_stop(self) -> bool:
        """Whether training should stop, or would if the rule did not only watch."""
        return self.kind == "plateau"


Array = NDArray[np.float64]

# Median of the square of a standard normal variable, and standard deviation over median absolute deviation.
_MEDIAN_SQUARE = 0.4549364
_PER_MAD = 1.4826


def theil_sen_slope(x: Array, y: Array) -> float:
    """The median of the slopes through every two points.

    A line by least squares leans on whatever stands at the ends of its window, where the corner of a curve and a
    single outlier do the most harm; this one ignores up to 29 % of the points.
    """
    later, earlier = _pairs(len(x))
    return float(np.median((y[later] - y[earlier]) / (x[later] - x[earlier])))


def scatter(x: Array, y: Array) -> float:
    """Standard deviation of independent noise around a smooth curve, whatever the curve.

    Each point is compared with the line through its two neighbours. What counts is the median of the squares: not a few
    outliers, nor a steep stretch. 0 for fewer than 3 points.
    """
    if len(x) < 3:
        return 0.0
    part = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    beside = y[1:-1] - (1 - part) * y[:-2] - part * y[2:]
    return math.sqrt(float(np.median(beside**2 / (1 + part**2 + (1 - part) ** 2))) / _MEDIAN_SQUARE)


def lasting_scatter(x: Array, y: Array, block: int) -> float:
    """As :func:`scatter`, for noise that lingers over up to ``block`` points.

    It is the scatter of independent noise whose means over that many points, or fewer, vary as much.
    """
    found = [scatter(x, y)]
    for size in range(2, block + 1):
        count = len(x) // size
        means = [values[len(x) - count * size :].reshape(count, size).mean(axis=1) for values in (x, y)]
        found.append(math.sqrt(size) * scatter(*means))
    return max(found)


def residual_scatter(x: Array, y: Array, slope: float) -> float:
    """Robust standard deviation of 3 points or more around a line with this slope; noise that lingers shows here."""
    beside = y - slope * x
    beside = beside - np.median(beside)
    return _PER_MAD * float(np.median(np.abs(beside))) * math.sqrt(len(x) / (len(x) - 2))


def spread(x: Array) -> float:
    """Square root of the sum of squares about the mean: noise over this is the standard error of a slope."""
    return float(np.linalg.norm(x - x.mean()))


def window_for(x: Array, noise: float, error: float, least: int, most: int) -> int:
    """How many of the last points a line needs for its slope to be known to a standard ``error``.

    At least ``least``; where no number is enough, ``most`` or all there are. ``noise`` is the standard deviation of a
    point.
    """
    most = min(most, len(x))
    back = x[::-1][:most] - x[-1]
    count = np.arange(1, most + 1)
    squares = np.cumsum(back**2) - np.cumsum(back) ** 2 / count
    enough = np.flatnonzero(noise**2 <= squares * error**2) + 1
    enough = enough[enough >= least]
    return int(enough[0]) if len(enough) else most


def paired_error(x: Array, influences: Array) -> float:
    """Standard error of a slope from the choice of the probe's samples, by their influences on every value.

    The error of a single value (`mir_se`) is of no use here: the samples are the same in every evaluation, and what
    they have in common cancels in a slope. What is left is how differently the samples move; ``influences`` is (N, S).
    """
    weights = (x - x.mean()) / spread(x) ** 2
    of_slope = weights @ influences  # (S,)
    return float(of_slope.std(ddof=1)) / math.sqrt(influences.shape[1])


def level_above_best(y: Array, window: int) -> float:
    """How far the mean of the last ``window`` points lies above the lowest mean of half as many in a row."""
    half = window // 2
    sums = np.cumsum(np.concatenate([[0.0], y]))
    return float(y[-window:].mean() - ((sums[half:] - sums[:-half]) / half).min())


def _pairs(count: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    later, earlier = np.tril_indices(count, -1)
    return later, earlier


Records = Sequence[EvalRecord]

# No two logarithms of floating-point numbers lie farther apart.
_LARGEST_DELTA = 1000
# Standard errors around the gain. A run is judged many times: this is not the error of a single look.
_STANDARD_ERRORS = 1.75
# The window grows until the uncertainty is this share of min_delta; a run that has levelled off then shows it.
_SHARE = 0.6
_GROWTH = 3  # windows at most
_LOOK_BACK = 1.5  # how far a window looks back at least, in horizons: no farther ahead than it has seen
# A confident rise by less than this share of min_delta counts as flat, or an exactly settled run could never stop.
_NEGLIGIBLE_RISE = 0.5
# How far back the level of the window is compared with earlier levels, in windows.
_MEMORY_WINDOWS = 3
# Noise is taken from this many windows: from fewer points it is uncertain itself, earlier ones lie in a steeper fall.
_NOISE_WINDOWS = 2
# Dense evaluations share noise that lingers: means of neighbours show it, as long as a window holds this many of them.
_BLOCKS = 5
# A line through this many windows is heard as well, unless it differs from the shorter one by more than so many of its
# standard errors. Noise that lingers can make a few evaluations look level, and their error up to three times too
# small; only a larger difference proves that the curve has bent.
_CHECKED_WINDOWS = 2
_BEND = 4.5


def _option(default: Any, help_: str) -> Any:
    return field(default=default, metadata={"help": help_})


@dataclass(frozen=True)
class PlateauRule:
    """Stop when going on would confidently bring little.

    A plateau needs all of: enough finite evaluations after the warm-up, the latest among them; an expected gain within
    the horizon that is smaller than ``min_delta`` by 1.75 standard errors, and so is an expected rise; no confident
    rise; no gain of ``min_delta`` along a line through two windows, unless the curve has clearly bent since; and a
    level no more than ``min_delta`` above the lowest level of the last three windows (warm-up included), so that the
    flat top between an early rise and the fall after it is not taken for the end.

    The line is fitted to the last ``window`` evaluations, to more where they span less than one and a half horizons,
    and to up to three times as many where noise demands it. A new training stage (a record's `stage` changes) starts
    all over.

    Raises:
        ConfigError: a value breaks its rule.
    """

    window: int = _option(7, "fewest evaluations the line is fitted to, at least 4")
    min_delta: float = _option(0.02, "fall of MIR within the horizon that is still worth going on for, at most 1000")
    warmup: int = _option(5, "evaluations at the start of a stage that the line is never fitted to, step 0 included")
    horizon: float | None = _option(
        0.1, "how far ahead to look: a part of the planned run, or a number of steps; 0 or None for the window's length"
    )
    patience: int = _option(1, "evaluations in a row that must find the plateau")
    patience_steps: int = _option(0, "steps for which evaluations must have found the plateau")
    log_steps: bool = _option(False, "fit against the logarithm of the step, if MIR falls with every doubling")
    observe_only: bool = _option(False, "say what it would do, and never stop")

    def __post_init__(self) -> None:
        """Check the options."""
        _check_integer("window", self.window, 4, "evaluations")
        _check_integer("warmup", self.warmup, 0, "evaluations")
        _check_integer("patience", self.patience, 1, "evaluations")
        _check_integer("patience_steps", self.patience_steps, 0, "steps")
        if not _is_positive(self.min_delta):
            raise ConfigError(f"min_delta must be a positive number of MIR, got {self.min_delta!r}; use e.g. 0.02")
        if self.min_delta > _LARGEST_DELTA:
            raise ConfigError(
                f"min_delta must be at most {_LARGEST_DELTA}, got {self.min_delta!r}; MIR is a logarithm, use e.g. 0.02"
            )
        horizon = self.horizon
        if horizon is not None and not (_is_positive(horizon) and (horizon < 1 or float(horizon).is_integer())):
            raise ConfigError(
                "horizon must be a part of the run below 1, a whole number of steps, or None for the window's length, "
                f"got {horizon!r}; use e.g. 0.1"
            )
        for name in ("log_steps", "observe_only"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def verdict(self, records: Iterable[EvalRecord | Mapping[str, Any]]) -> Verdict:
        """Judge a history.

        Args:
            records: the run's, oldest first, or mappings with their `step` and `mir` (None or NaN where an evaluation
                failed); used where they are known: `max_steps`, `stage`, `influences` with `probe_fingerprint`.

        Returns:
            The verdict; the same history always gives the same one.

        Ranks: pure. Inside a run rank 0 decides and the others follow.
        """
        stage = _last_stage(as_records(records))
        found = self._look(stage)
        if found.kind != "plateau":
            return found
        asked = self._still_asked(stage)
        if asked:
            return Verdict("going on", f"{found.reason}; {asked}", found.expected_gain, found.expected_gain_se)
        if self.observe_only:
            return Verdict("plateau", found.reason, found.expected_gain, found.expected_gain_se, observed=True)
        return found

    def _still_asked(self, stage: Records) -> str | None:
        """What patience still asks for of a stage whose latest evaluation found the plateau."""
        last, flat = stage[-1].step, 1
        since = last
        while flat < len(stage) and (flat < self.patience or last - since < self.patience_steps):
            if self._look(stage[:-flat]).kind != "plateau":
                break
            since = stage[-flat - 1].step
            flat += 1
        if flat < self.patience:
            return f"found by {flat} of {self.patience} evaluations in a row"
        if last - since < self.patience_steps:
            return f"found for {last - since} of {self.patience_steps} steps"
        return None

    def _look(self, stage: Records) -> Verdict:
        """What the evaluations of a stage say, without patience."""
        points = [record for record in stage[self.warmup :] if record.mir is not None]
        if stage and stage[-1].mir is None:
            return Verdict("no data", "the latest evaluation gave no finite MIR")
        if len(points) < self.window:
            return Verdict(
                "no data", f"{len(points)} of {self.window} evaluations in the window, after {self.warmup} of warm-up"
            )
        if any(later.step <= earlier.step for earlier, later in pairwise(points)):
            return Verdict("no data", "the steps of the window do not increase; the history is damaged")
        last = float(points[-1].step)
        horizon, words = self._horizon(points)
        back = _LOOK_BACK * horizon if self.horizon is not None else horizon
        if last - points[0].step < horizon:
            return Verdict(
                "no data", f"evaluations after the warm-up span {last - points[0]['step']:.0f} steps, less than {words}"
            )
        least = max(self.window, sum(record.step >= last - back for record in points))
        points = points[-_GROWTH * least :]
        steps = np.array([record.step for record in points], dtype=np.float64)
        x, ahead = steps, horizon
        if self.log_steps:
            x, ahead = np.log1p(steps), math.log1p(last + horizon) - math.log1p(last)
        gain, error, count = self._gain(points, x, ahead, least)
        told = (
            f"in the next {words} MIR would {'fall' if gain >= 0 else 'rise'} by {abs(gain):.4f} (standard error "
            f"{error:.4f}), from {count} evaluations, steps {steps[-count]:.0f} to {last:.0f}"
        )
        kind, more = self._weigh(gain, error, [r.mir for r in stage if r.mir is not None], count)
        return Verdict(kind, f"{told}; {more}" if more else told, gain, error)

    def _horizon(self, points: Records) -> tuple[float, str]:
        """Length of the horizon in steps, and in words."""
        planned = points[-1].max_steps
        if self.horizon is not None and self.horizon >= 1:
            return float(self.horizon), f"{self.horizon:.0f} steps"
        if self.horizon is not None and planned is not None and _is_positive(planned):
            return self.horizon * planned, f"{self.horizon * planned:.0f} steps ({self.horizon:.0%} of the run)"
        length = float(points[-1].step - points[-self.window].step)
        return length, f"{length:.0f} steps"

    def _gain(self, points: Records, x: Array, ahead: float, least: int) -> tuple[float, float, int]:
        """Expected fall over the horizon, its standard error, and how many evaluations it comes from."""
        values = np.array([record.mir for record in points], dtype=np.float64)
        recent = slice(-_NOISE_WINDOWS * least, None)
        noise = lasting_scatter(x[recent], values[recent], max(1, least // _BLOCKS))
        wanted = _SHARE * self.min_delta / (_STANDARD_ERRORS * ahead)
        count = window_for(x, noise, wanted, least, len(x))
        near = _line(points[-count:], x[-count:], noise, ahead)
        longer = min(max(count, _CHECKED_WINDOWS * least), len(x))
        far = _line(points[-longer:], x[-longer:], noise, ahead)
        if abs(far[0]) >= self.min_delta and abs(far[0] - near[0]) <= _BEND * near[1]:
            return *far, longer
        return *near, count

    def _weigh(self, gain: float, error: float, values: Sequence[float], count: int) -> tuple[Any, str]:
        """The kind of verdict and what decided it."""
        margin = _STANDARD_ERRORS * error
        if gain + margin < 0 and gain < -_NEGLIGIBLE_RISE * self.min_delta:
            return "rising", ""
        if abs(gain) + margin >= self.min_delta:
            if margin >= self.min_delta and abs(gain) <= margin:
                return "too noisy", (
                    f"too uncertain to tell from min_delta={self.min_delta}: evaluate more often, use more samples or "
                    "a larger min_delta"
                )
            return "going on", f"not confidently below min_delta={self.min_delta}"
        above = level_above_best(np.array(values[-_MEMORY_WINDOWS * count :], dtype=np.float64), count)
        if above > self.min_delta:
            return "going on", f"flat, but {above:.4f} above its recent lowest level"
        return "plateau", f"confidently below min_delta={self.min_delta}"


def _last_stage(history: Records) -> Records:
    """The records since the last change of `stage`; one that has none belongs to the stage before it."""
    start, current = 0, None
    for number, record in enumerate(history):
        marker = record.stage
        if marker is not None and current is not None and marker != current:
            start = number
        current = current if marker is None else marker
    return history[start:]


def _line(points: Records, x: Array, noise: float, ahead: float) -> tuple[float, float]:
    """Expected fall along the line through these points, and its standard error; ``noise`` is the least there is."""
    values = np.array([record.mir for record in points], dtype=np.float64)
    slope = theil_sen_slope(x, values)
    noise = max(noise, residual_scatter(x, values, slope))
    influences = _influences(points)
    sampling = paired_error(x, influences) if influences is not None else 0.0
    return -slope * ahead, math.hypot(noise / spread(x), sampling) * ahead


def _influences(points: Records) -> Array | None:
    """(N, S), if every record knows them, all finite, and they are of the same samples."""
    rows = [record.influences for record in points if record.influences is not None and len(record.influences) > 1]
    if len(rows) < len(points) or len({(each.probe_fingerprint, len(each.influences or ())) for each in points}) > 1:
        return None
    return np.array(rows, dtype=np.float64)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _check_integer(name: str, value: object, least: int, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least} {unit}, got {value!r}")
