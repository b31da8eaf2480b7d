# SPDX-License-Identifier: Apache-2.0
"""Has MIR stopped moving? A pure rule from history to verdict.

What counts is what going on would bring: a robust line through the last evaluations says how far MIR would still fall
within a horizon, a part of the run, and its standard error how well that is known. The run is on its plateau only if
that gain is small *and known to be small*. "No new best for P evaluations" would not do: MIR rises at first while a
fresh projector's outputs grow, and only then falls. Reasons and measured rates: docs/stopping.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mir_callback.errors import ConfigError
from mir_callback.training import trend
from mir_callback.training.trend import Array
from mir_callback.training.verdicts import Verdict

Records = Sequence[Mapping[str, Any]]

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

    Attributes:
        window: fewest evaluations the line is fitted to, at least 4.
        min_delta: fall of MIR within the horizon that is still worth going on for, in MIR (log10 units); at most 1000.
        warmup: evaluations at the start of a stage that the line is never fitted to, the one at step 0 included.
        horizon: how far ahead is looked: a part of the planned run below 1, or a number of steps; None for the length
            of ``window`` evaluations, which is also what a history gets that does not know its run's `max_steps`.
        patience: evaluations in a row that must find the plateau, at least 1.
        patience_steps: steps for which evaluations must have found nothing else.
        log_steps: fit against the logarithm of the step: for runs whose MIR falls by as much with every doubling.
        observe_only: say what it would do, and never stop.

    Raises:
        ConfigError: a value breaks its rule.
    """

    window: int = 7
    min_delta: float = 0.02
    warmup: int = 5
    horizon: float | None = 0.1
    patience: int = 1
    patience_steps: int = 0
    log_steps: bool = False
    observe_only: bool = False

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

    def verdict(self, history: Records) -> Verdict:
        """Judge a history.

        Args:
            history: records with `step` and `mir` (None or NaN where an evaluation failed), oldest first, from the
                start of the run; used where they are known: `max_steps`, the planned length of the run; `stage`;
                `influences` of the probe's samples with `probe_fingerprint`.

        Returns:
            The verdict; the same history always gives the same one.

        Ranks: pure. Inside a run rank 0 decides and the others follow.
        """
        stage = _last_stage(history)
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
        last, flat = stage[-1]["step"], 1
        since = last
        while flat < len(stage) and (flat < self.patience or last - since < self.patience_steps):
            if self._look(stage[:-flat]).kind != "plateau":
                break
            since = stage[-flat - 1]["step"]
            flat += 1
        if flat < self.patience:
            return f"found by {flat} of {self.patience} evaluations in a row"
        if last - since < self.patience_steps:
            return f"found for {last - since} of {self.patience_steps} steps"
        return None

    def _look(self, stage: Records) -> Verdict:
        """What the evaluations of a stage say, without patience."""
        points = [record for record in stage[self.warmup :] if _is_finite(record["mir"])]
        if stage and not _is_finite(stage[-1]["mir"]):
            return Verdict("no data", "the latest evaluation gave no finite MIR")
        if len(points) < self.window:
            return Verdict(
                "no data", f"{len(points)} of {self.window} evaluations in the window, after {self.warmup} of warm-up"
            )
        if any(later["step"] <= earlier["step"] for earlier, later in pairwise(points)):
            return Verdict("no data", "the steps of the window do not increase; the history is damaged")
        last = float(points[-1]["step"])
        horizon, words = self._horizon(points)
        back = _LOOK_BACK * horizon if self.horizon is not None else horizon
        if last - points[0]["step"] < horizon:
            return Verdict(
                "no data", f"evaluations after the warm-up span {last - points[0]['step']:.0f} steps, less than {words}"
            )
        least = max(self.window, sum(record["step"] >= last - back for record in points))
        points = points[-_GROWTH * least :]
        steps = np.array([record["step"] for record in points], dtype=np.float64)
        x, ahead = steps, horizon
        if self.log_steps:
            x, ahead = np.log1p(steps), math.log1p(last + horizon) - math.log1p(last)
        gain, error, count = self._gain(points, x, ahead, least)
        told = (
            f"in the next {words} MIR would {'fall' if gain >= 0 else 'rise'} by {abs(gain):.4f} (standard error "
            f"{error:.4f}), from {count} evaluations, steps {steps[-count]:.0f} to {last:.0f}"
        )
        kind, more = self._weigh(gain, error, [r["mir"] for r in stage if _is_finite(r["mir"])], count)
        return Verdict(kind, f"{told}; {more}" if more else told, gain, error)

    def _horizon(self, points: Records) -> tuple[float, str]:
        """Length of the horizon in steps, and in words."""
        planned = points[-1].get("max_steps")
        if self.horizon is not None and self.horizon >= 1:
            return float(self.horizon), f"{self.horizon:.0f} steps"
        if self.horizon is not None and planned is not None and _is_positive(planned):
            return self.horizon * planned, f"{self.horizon * planned:.0f} steps ({self.horizon:.0%} of the run)"
        length = float(points[-1]["step"] - points[-self.window]["step"])
        return length, f"{length:.0f} steps"

    def _gain(self, points: Records, x: Array, ahead: float, least: int) -> tuple[float, float, int]:
        """Expected fall over the horizon, its standard error, and how many evaluations it comes from."""
        values = np.array([record["mir"] for record in points], dtype=np.float64)
        recent = slice(-_NOISE_WINDOWS * least, None)
        noise = trend.lasting_scatter(x[recent], values[recent], max(1, least // _BLOCKS))
        wanted = _SHARE * self.min_delta / (_STANDARD_ERRORS * ahead)
        count = trend.window_for(x, noise, wanted, least, len(x))
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
        above = trend.level_above_best(np.array(values[-_MEMORY_WINDOWS * count :], dtype=np.float64), count)
        if above > self.min_delta:
            return "going on", f"flat, but {above:.4f} above its recent lowest level"
        return "plateau", f"confidently below min_delta={self.min_delta}"


def _last_stage(history: Records) -> Records:
    """The records since the last change of `stage`; one that has none belongs to the stage before it."""
    start, current = 0, None
    for number, record in enumerate(history):
        marker = record.get("stage")
        if marker is not None and current is not None and marker != current:
            start = number
        current = current if marker is None else marker
    return history[start:]


def _line(points: Records, x: Array, noise: float, ahead: float) -> tuple[float, float]:
    """Expected fall along the line through these points, and its standard error; ``noise`` is the least there is."""
    values = np.array([record["mir"] for record in points], dtype=np.float64)
    slope = trend.slope(x, values)
    noise = max(noise, trend.residual_scatter(x, values, slope))
    influences = _influences(points)
    sampling = trend.paired_error(x, influences) if influences is not None else 0.0
    return -slope * ahead, math.hypot(noise / trend.spread(x), sampling) * ahead


def _influences(points: Records) -> Array | None:
    """(N, S), if every record knows them, all finite, and they are of the same samples."""
    rows = [record.get("influences") for record in points]
    if any(not isinstance(row, (list, tuple)) or len(row) < 2 for row in rows):
        return None
    if len({(record.get("probe_fingerprint"), len(record["influences"])) for record in points}) > 1:
        return None
    found = np.array(rows, dtype=np.float64)
    return found if np.isfinite(found).all() else None


def _is_finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _check_integer(name: str, value: object, least: int, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least} {unit}, got {value!r}")
