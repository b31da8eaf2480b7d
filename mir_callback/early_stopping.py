# SPDX-License-Identifier: Apache-2.0
"""Has MIR stopped falling? A pure rule from history to verdict.

A robust line through the last evaluations estimates how far MIR would still fall within a horizon (a part of the run),
with a standard error. The run is on its plateau only if that gain is small *and known to be small*. "No new best for P
evaluations" would not do: MIR rises at first while a fresh projector's outputs grow, and only then falls. How often it
is wrong: docs/stopping.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mir_callback.errors import ConfigError
from mir_callback.record import EvalRecord, as_records

VerdictKind = Literal["going on", "plateau", "rising", "too noisy", "no data"]


@dataclass(frozen=True)
class Verdict:
    """A rule's answer for a history.

    Attributes:
        kind: "going on", "plateau", "rising", "too noisy" or "no data"; only "plateau" stops a run.
        reason: the figures behind it, as a sentence.
        expected_gain: how far MIR would still fall within the rule's horizon; negative if it rises, None if unknown.
        expected_gain_se: its standard error.
        observed: the rule only observes: it reports a plateau, and training goes on.
        summary: the verdict in a word or three, for a console line; the kind if empty.

    Example:
        >>> Verdict("plateau", "MIR is level").stop
        True
    """

    kind: VerdictKind
    reason: str
    expected_gain: float | None = None
    expected_gain_se: float | None = None
    observed: bool = False
    summary: str = ""

    @property
    def stop(self) -> bool:
        """Whether training should stop."""
        return self.kind == "plateau" and not self.observed

    @property
    def would_stop(self) -> bool:
        """Whether training should stop, or would if the rule did not only observe."""
        return self.kind == "plateau"


Array = NDArray[np.float64]

# Median of the square of a standard normal variable, and standard deviation over median absolute deviation.
_MEDIAN_SQUARE = 0.4549364
_PER_MAD = 1.4826


def theil_sen_slope(x: Array, y: Array) -> float:
    """The Theil-Sen estimate: the median of the slopes through every two points.

    Least squares gives most weight to the ends of the window, where a bend of the curve or one outlier does the most
    harm; this estimate tolerates up to 29 % of outliers.
    """
    later, earlier = _pairs(len(x))
    return float(np.median((y[later] - y[earlier]) / (x[later] - x[earlier])))


def scatter(x: Array, y: Array) -> float:
    """Standard deviation of independent noise around a smooth curve, whatever the curve.

    Each point is compared with the line through its two neighbours; the median of the squares ignores a few outliers
    and a steep stretch. 0 for fewer than 3 points.
    """
    if len(x) < 3:
        return 0.0
    part = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
    beside = y[1:-1] - (1 - part) * y[:-2] - part * y[2:]
    return math.sqrt(float(np.median(beside**2 / (1 + part**2 + (1 - part) ** 2))) / _MEDIAN_SQUARE)


def autocorrelated_scatter(x: Array, y: Array, block: int) -> float:
    """As :func:`scatter`, for noise that is autocorrelated over up to ``block`` points.

    It is the largest scatter of the means of 1 to ``block`` neighbours, scaled to a single point.
    """
    found = [scatter(x, y)]
    for size in range(2, block + 1):
        count = len(x) // size
        means = [values[len(x) - count * size :].reshape(count, size).mean(axis=1) for values in (x, y)]
        found.append(math.sqrt(size) * scatter(*means))
    return max(found)


def residual_scatter(x: Array, y: Array, slope: float) -> float:
    """Robust standard deviation of 3 points or more around a line with this slope; sees autocorrelated noise too."""
    beside = y - slope * x
    beside = beside - np.median(beside)
    return _PER_MAD * float(np.median(np.abs(beside))) * math.sqrt(len(x) / (len(x) - 2))


def spread(x: Array) -> float:
    """Square root of the sum of squares about the mean; noise divided by it is the standard error of a slope."""
    return float(np.linalg.norm(x - x.mean()))


def window_for(x: Array, noise: float, error: float, least: int, most: int) -> int:
    """How many of the last points a line needs for its slope to have a standard error of at most ``error``.

    At least ``least``; if no number is enough, ``most`` or all there are. ``noise`` is the standard deviation of a
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

    The samples are the same in every evaluation, so what they share cancels in a slope, and the error of a single value
    (`mir_se`) would be far too large. ``influences`` is (N evaluations, S samples).
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
# Standard errors around the gain. The rule is applied at every evaluation: this is not a single test's quantile.
_STANDARD_ERRORS = 1.75
# The window grows until the uncertainty is this share of min_delta; a run that has levelled off then shows it.
_SHARE = 0.6
_GROWTH = 3  # windows at most
_LOOK_BACK = 1.5  # how far a window looks back at least, in horizons: no farther ahead than it has seen
# A confident rise by less than this share of min_delta counts as flat, or an exactly settled run could never stop.
_NEGLIGIBLE_RISE = 0.5
# How far back earlier levels are compared with the level of the window, in windows.
_MEMORY_WINDOWS = 3
# Noise is taken from this many windows: from fewer points it is uncertain itself, earlier ones lie in a steeper fall.
_NOISE_WINDOWS = 2
# Noise of dense evaluations is autocorrelated: means of neighbours show it, as long as a window holds so many of them.
_BLOCKS = 5
# A line through this many windows is fitted too. If it falls by min_delta or more, the longer fit decides, unless the
# two differ by more than so many standard errors: autocorrelated noise can make a few evaluations look level, with an
# error up to three times too small, and only a larger difference shows that the curve has bent.
_CHECKED_WINDOWS = 2
_BEND = 4.5


def _option(default: Any, help_: str) -> Any:
    return field(default=default, metadata={"help": help_})


@dataclass(frozen=True)
class PlateauRule:
    """Stop when training on would confidently bring little.

    A plateau needs all of this: enough finite evaluations after the warm-up, the latest among them; an expected change
    within the horizon that is below ``min_delta`` by 1.75 standard errors, up and down; no fall by ``min_delta`` along
    a line through two windows, unless the curve has clearly bent since; and a level at most ``min_delta`` above the
    lowest of the last three windows (warm-up included), so that the flat top between an early rise and the fall after
    it does not end the run.

    The line is fitted to the last ``window`` evaluations, to more if they span less than one and a half horizons, and
    to up to three times as many if noise demands it. A new training stage (a record's `stage` changes) starts over.

    Raises:
        ConfigError: an option is out of range.

    Example:
        >>> level = [{"step": step, "mir": 2.0, "max_steps": 1000} for step in range(0, 1000, 50)]
        >>> verdict = PlateauRule().verdict(level)
        >>> verdict.kind, verdict.stop
        ('plateau', True)
    """

    window: int = _option(7, "fewest evaluations the line is fitted to, at least 4")
    min_delta: float = _option(0.02, "fall of MIR within the horizon that is still worth going on for, at most 1000")
    warmup: int = _option(5, "evaluations at the start of a stage that no line is fitted to, step 0 included")
    horizon: float | None = _option(
        0.1, "how far ahead to look: a part of the planned run, or a number of steps; 0 or None: the window's length"
    )
    patience: int = _option(1, "evaluations in a row that must find the plateau")
    patience_steps: int = _option(0, "steps over which evaluations must have found the plateau")
    log_steps: bool = _option(False, "fit against the logarithm of the step, if MIR falls with every doubling")
    observe_only: bool = _option(False, "say what it would do, and never stop")

    def __post_init__(self) -> None:
        """Check the options."""
        _check_integer("window", self.window, 4, "evaluations")
        _check_integer("warmup", self.warmup, 0, "evaluations")
        _check_integer("patience", self.patience, 1, "evaluations")
        _check_integer("patience_steps", self.patience_steps, 0, "steps")
        if not _is_positive(self.min_delta):
            raise ConfigError(f"min_delta={self.min_delta!r}: it is a fall of MIR, above 0, for example 0.02")
        if self.min_delta > _LARGEST_DELTA:
            raise ConfigError(
                f"min_delta={self.min_delta!r} is above {_LARGEST_DELTA}: MIR is a logarithm, use for example 0.02"
            )
        horizon = self.horizon
        if horizon is not None and not (_is_positive(horizon) and (horizon < 1 or float(horizon).is_integer())):
            raise ConfigError(
                f"horizon={horizon!r}: give a part of the run below 1, such as 0.1, a whole number of steps, or None "
                "for the window's length"
            )
        for name in ("log_steps", "observe_only"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: give True or False")

    @property
    def min_evaluations(self) -> int:
        """The fewest evaluations of a stage after which the rule can stop a run."""
        in_a_row = max(self.patience, 2 if self.patience_steps else 1)
        return self.warmup + self.window + in_a_row - 1

    def verdict(self, records: Iterable[EvalRecord | Mapping[str, Any]]) -> Verdict:
        """Judge a history.

        Args:
            records: of the run, oldest first, or mappings with `step` and `mir` (None or NaN: a failed evaluation);
                used if known: `max_steps`, `stage`, `influences` with `probe_fingerprint`.

        Returns:
            The verdict; the same for the same history.

        Ranks: pure. In a run rank 0 decides and the others follow.
        """
        stage = _last_stage(as_records(records))
        found = self._look(stage)
        if found.kind != "plateau":
            return found
        patience = self._missing_patience(stage)
        if patience:
            reason = f"{found.reason}; found so far by {patience}, as patience asks"
            return replace(found, kind="going on", reason=reason, summary=f"plateau ({patience})")
        return replace(found, observed=self.observe_only)

    def _missing_patience(self, stage: Records) -> str | None:
        """How far patience has come in a stage whose latest evaluation found the plateau; None if it is satisfied."""
        last, flat = stage[-1].step, 1
        since = last
        while flat < len(stage) and (flat < self.patience or last - since < self.patience_steps):
            if self._look(stage[:-flat]).kind != "plateau":
                break
            since = stage[-flat - 1].step
            flat += 1
        if flat < self.patience:
            return f"{flat} of {self.patience} evaluations"
        if last - since < self.patience_steps:
            return f"{last - since} of {self.patience_steps} steps"
        return None

    def _look(self, stage: Records) -> Verdict:
        """What the evaluations of a stage say, without patience."""
        points = [record for record in stage[self.warmup :] if record.mir is not None]
        if stage and stage[-1].mir is None:
            return Verdict("no data", "the latest evaluation gave no finite MIR")
        if len(points) < self.window:
            have = f"{len(points)} of {self.window}"
            return Verdict(
                "no data",
                f"{have} evaluations in the window, after {self.warmup} of warm-up",
                summary=f"waiting ({have})",
            )
        if any(later.step <= earlier.step for earlier, later in pairwise(points)):
            return Verdict("no data", "the steps in the window do not increase; the history is damaged")
        last = float(points[-1].step)
        horizon, words = self._horizon(points)
        back = _LOOK_BACK * horizon if self.horizon is not None else horizon
        if last - points[0].step < horizon:
            span = last - points[0].step
            return Verdict(
                "no data",
                f"evaluations after the warm-up span {span:.0f} steps, less than {words}",
                summary=f"waiting ({span:.0f} of {horizon:.0f} steps)",
            )
        least = max(self.window, sum(record.step >= last - back for record in points))
        points = points[-_GROWTH * least :]
        steps = np.array([record.step for record in points], dtype=np.float64)
        x, ahead = steps, horizon
        if self.log_steps:
            x, ahead = np.log1p(steps), math.log1p(last + horizon) - math.log1p(last)
        gain, error, count = self._gain(points, x, ahead, least)
        estimate = (
            f"in the next {words} MIR would {'fall' if gain >= 0 else 'rise'} by {abs(gain):.4f} (standard error "
            f"{error:.4f}), from {count} evaluations, steps {steps[-count]:.0f} to {last:.0f}"
        )
        kind, more, summary = self._weigh(gain, error, [r.mir for r in stage if r.mir is not None], count)
        return Verdict(kind, f"{estimate}; {more}" if more else estimate, gain, error, summary=summary)

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
        noise = autocorrelated_scatter(x[recent], values[recent], max(1, least // _BLOCKS))
        wanted = _SHARE * self.min_delta / (_STANDARD_ERRORS * ahead)
        count = window_for(x, noise, wanted, least, len(x))
        near = _line(points[-count:], x[-count:], noise, ahead)
        longer = min(max(count, _CHECKED_WINDOWS * least), len(x))
        far = _line(points[-longer:], x[-longer:], noise, ahead)
        if abs(far[0]) >= self.min_delta and abs(far[0] - near[0]) <= _BEND * near[1]:
            return *far, longer
        return *near, count

    def _weigh(self, gain: float, error: float, values: Sequence[float], count: int) -> tuple[Any, str, str]:
        """The kind of verdict, what decided it, and a summary in a word or three."""
        margin = _STANDARD_ERRORS * error
        if gain + margin < 0 and gain < -_NEGLIGIBLE_RISE * self.min_delta:
            return "rising", "", "rising"
        if abs(gain) + margin >= self.min_delta:
            if margin >= self.min_delta and abs(gain) <= margin:
                remedy = "evaluate more often, use more samples or a larger min_delta"
                return "too noisy", f"too uncertain to compare with min_delta={self.min_delta}: {remedy}", "too noisy"
            reason = f"not confidently below min_delta={self.min_delta}"
            return "going on", reason, "falling" if gain > 0 else "not level yet"
        above = level_above_best(np.array(values[-_MEMORY_WINDOWS * count :], dtype=np.float64), count)
        if above > self.min_delta:
            return "going on", f"level, but {above:.4f} above its recent lowest level", "level above its low"
        return "plateau", f"confidently below min_delta={self.min_delta}", "plateau"


def _last_stage(history: Records) -> Records:
    """The records since `stage` last changed; one without it belongs to the stage before."""
    start, current = 0, None
    for number, record in enumerate(history):
        marker = record.stage
        if marker is not None and current is not None and marker != current:
            start = number
        current = current if marker is None else marker
    return history[start:]


def _line(points: Records, x: Array, noise: float, ahead: float) -> tuple[float, float]:
    """Expected fall along the line through these points, and its standard error; ``noise`` is a lower bound."""
    values = np.array([record.mir for record in points], dtype=np.float64)
    slope = theil_sen_slope(x, values)
    noise = max(noise, residual_scatter(x, values, slope))
    influences = _influences(points)
    sampling = paired_error(x, influences) if influences is not None else 0.0
    return -slope * ahead, math.hypot(noise / spread(x), sampling) * ahead


def _influences(points: Records) -> Array | None:
    """(N, S), if every record has them, of the same samples."""
    rows = [record.influences for record in points if record.influences is not None and len(record.influences) > 1]
    if len(rows) < len(points) or len({(each.probe_fingerprint, len(each.influences or ())) for each in points}) > 1:
        return None
    return np.array(rows, dtype=np.float64)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _check_integer(name: str, value: object, least: int, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r}: give a whole number of {unit}, {least} or more")
