# SPDX-License-Identifier: Apache-2.0
"""Has MIR stopped moving? A pure rule from history to verdict.

Flatness is judged as the trend against its noise: a straight line is fitted to the last evaluations, and the run is
on its plateau only if the change along that line is small *and known to be small*. "No new best for P evaluations"
would not do: MIR rises at first while a fresh projector's outputs grow, and only then falls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from mir_callback.errors import ConfigError

VerdictKind = Literal["going on", "plateau", "rising", "no data"]

# Standard errors around the fitted change; with 8 points about a 95 % one-sided bound on either side.
_STANDARD_ERRORS = 2.0
# A confident rise by less than this share of min_delta counts as flat, or an exactly settled run could never stop.
_NEGLIGIBLE_RISE = 0.1
# How far back the level of the window is compared with earlier levels, in windows.
_MEMORY_WINDOWS = 3


@dataclass(frozen=True)
class Verdict:
    """What a rule made of a history.

    Attributes:
        kind: "going on", "plateau", "rising" or "no data".
        reason: the figures behind it, as a sentence.
    """

    kind: VerdictKind
    reason: str

    @property
    def stop(self) -> bool:
        """Whether training should stop."""
        return self.kind == "plateau"


@dataclass(frozen=True)
class PlateauRule:
    """Stop when MIR is confidently flat over a window of evaluations.

    A plateau needs all of: ``window`` finite evaluations after the warm-up, the latest among them; a fitted change
    over them smaller than ``min_delta`` by two standard errors, up or down; no confident rise; and a level no more
    than ``min_delta`` above the lowest level of the last three windows (warm-up included), so that the flat top between
    an early rise and the fall after it is not taken for the end.

    A steady fall by less than ``min_delta`` over the window counts as flat: that is what ``min_delta`` means. With
    evaluations close to each other choose a longer window or a smaller ``min_delta``.

    Attributes:
        window: evaluations the line is fitted to, at least 4.
        min_delta: change of MIR over the window that still counts as movement, in MIR (log10 units).
        warmup: evaluations at the start of the run that the line is never fitted to, the one at step 0 included.

    Raises:
        ConfigError: a value breaks its rule.
    """

    window: int = 8
    min_delta: float = 0.02
    warmup: int = 5

    def __post_init__(self) -> None:
        """Check the options."""
        _check_integer("window", self.window, 4)
        _check_integer("warmup", self.warmup, 0)
        number = isinstance(self.min_delta, (int, float)) and not isinstance(self.min_delta, bool)
        if not number or not math.isfinite(self.min_delta) or self.min_delta <= 0:
            raise ConfigError(f"min_delta must be a positive number of MIR, got {self.min_delta!r}; use e.g. 0.02")

    def verdict(self, history: Sequence[Mapping[str, Any]]) -> Verdict:
        """Judge a history.

        Args:
            history: records with `step` and `mir` (None or NaN where an evaluation failed), oldest first, from the
                start of the run.

        Returns:
            The verdict; the same history always gives the same one.

        Ranks: pure. Inside a run rank 0 decides and the others follow.
        """
        everything = _finite_points(history)
        points = _finite_points(history[self.warmup :])
        if history and not _is_finite(history[-1]["mir"]):
            return Verdict("no data", "the latest evaluation gave no finite MIR")
        if len(points) < self.window:
            return Verdict(
                "no data", f"{len(points)} of {self.window} evaluations in the window, after {self.warmup} of warm-up"
            )
        if any(later <= earlier for (earlier, _), (later, _) in pairwise(points[-self.window :])):
            return Verdict("no data", "the steps of the window do not increase; the history is damaged")
        change, error = _fitted_change(points[-self.window :])
        told = (
            f"MIR changed by {change:+.4f} (standard error {error:.4f}) "
            f"over steps {points[-self.window][0]} to {points[-1][0]}"
        )
        margin = _STANDARD_ERRORS * error
        if change - margin > 0 and change > _NEGLIGIBLE_RISE * self.min_delta:
            return Verdict("rising", told)
        if abs(change) + margin >= self.min_delta:
            return Verdict("going on", f"{told}; not confidently below min_delta={self.min_delta}")
        above = _level_above_best([value for _, value in everything], self.window)
        if above > self.min_delta:
            return Verdict("going on", f"{told}; flat, but {above:.4f} above its recent lowest level")
        return Verdict("plateau", f"{told}; confidently below min_delta={self.min_delta}")


def _finite_points(history: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    return [(record["step"], record["mir"]) for record in history if _is_finite(record["mir"])]


def _is_finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _fitted_change(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Change along the least-squares line from the first to the last step, and its standard error."""
    count = len(points)
    mean_step = math.fsum(step for step, _ in points) / count
    mean_value = math.fsum(value for _, value in points) / count
    spread = math.fsum((step - mean_step) ** 2 for step, _ in points)
    slope = math.fsum((step - mean_step) * (value - mean_value) for step, value in points) / spread
    residual = math.fsum((value - mean_value - slope * (step - mean_step)) ** 2 for step, value in points)
    length = points[-1][0] - points[0][0]
    return slope * length, math.sqrt(residual / (count - 2) / spread) * length


def _level_above_best(values: Sequence[float], window: int) -> float:
    """How far the mean of the last window lies above the lowest mean of half a window among those remembered."""
    recent = values[-_MEMORY_WINDOWS * window :]
    half = window // 2
    levels = [math.fsum(recent[end - half : end]) / half for end in range(half, len(recent) + 1)]
    return math.fsum(recent[-window:]) / window - min(levels)


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be an integer of at least {least} evaluations, got {value!r}")
