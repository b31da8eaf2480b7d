# SPDX-License-Identifier: Apache-2.0
"""Has MIR stopped falling? A pure rule from history to verdict.

A robust line through the last evaluations estimates how far MIR would still fall within a horizon (a part of the run),
with a standard error. The run is on its plateau only if that gain is small *and known to be small*. "No new best for P
evaluations" would not do: MIR rises at first while a fresh projector's outputs grow, and only then falls. How often it
is wrong: docs/stopping.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mir_callback.errors import ConfigError
from mir_callback.record import EvalRecord, as_records
from mir_callback.trend import (
    Array,
    Cells,
    level_above_best,
    median,
    paired_error,
    residual_scatter,
    scatter,
    spread,
    theil_sen_slope,
    window_for,
)

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


Records = Sequence[EvalRecord]
_NONE: Array = np.empty(0)

# No two logarithms of floating-point numbers lie farther apart.
_LARGEST_DELTA = 1000
# Standard errors around the gain. The rule is applied at every evaluation: this is not a single test's quantile.
_STANDARD_ERRORS = 1.5
# The window grows until the uncertainty is this share of min_delta; a run that has levelled off then shows it.
_SHARE = 0.6
_GROWTH = 3  # windows at most
_CELLS = 8  # parts of what a window looks back on, in which evaluations are put together
_LOOK_BACK = 1.5  # how far a window looks back at least, in horizons: no farther ahead than it has seen
# A confident rise by less than this share of min_delta counts as flat, or an exactly settled run could never stop.
_NEGLIGIBLE_RISE = 0.5
# How far back earlier levels are compared with the level of the window, in windows.
_MEMORY_WINDOWS = 3
# Noise is taken from this many windows: from fewer points it is uncertain itself, earlier ones lie in a steeper fall.
_NOISE_WINDOWS = 2
# A line through this many windows is fitted too. If it falls by min_delta or more, the longer fit decides, unless the
# two differ by more than so many standard errors: autocorrelated noise can make a few evaluations look level, with an
# error up to three times too small, and only a larger difference shows that the curve has bent.
_CHECKED_WINDOWS = 2
_BEND, _BEND_IN_NOISE = 3.0, 15.0
# Parts of a stage before which it is not ended: one whose MIR has fallen since its peak, and one whose MIR has not and
# may still be about to. Without the planned length the second is counted in windows.
_EARLIEST, _EARLIEST_UNFALLEN, _UNFALLEN_WINDOWS = 0.25, 0.6, 2
_PEAK_NOISE = 2.0  # how far noise alone lifts the highest median of three values in a run, in standard deviations


def _option(default: Any, help_: str) -> Any:
    return field(default=default, metadata={"help": help_})


@dataclass(frozen=True)
class PlateauRule:
    """Stop when training on would confidently bring little.

    A plateau needs all of this: enough finite evaluations after the warm-up, the latest among them; an expected change
    within the horizon that is below ``min_delta`` by 1.5 standard errors, up and down; no fall by ``min_delta`` along a
    line that looks back twice as far, unless the curve has clearly bent since; and a level at most ``min_delta`` above
    the lowest of the last three windows (warm-up included), so that the flat top between an early rise and the fall
    after it does not end the run. A plateau ends the run after a quarter of it, or 60 % where MIR has not fallen since
    its peak, and when no drop of the learning rate and no further epoch lies ahead.

    The line is fitted to the last one and a half horizons, to at least ``window`` evaluations, and to up to three times
    as many if noise demands it; dense evaluations are put together before. A new training stage (a record's `stage`
    changes) starts over.

    Raises:
        ConfigError: an option is out of range.

    Example:
        >>> level = [{"step": step, "mir": 2.0, "max_steps": 1000} for step in range(0, 1000, 50)]
        >>> verdict = PlateauRule().verdict(level)
        >>> verdict.kind, verdict.stop
        ('plateau', True)
    """

    window: int = _option(5, "fewest evaluations the line is fitted to, at least 4")
    min_delta: float = _option(0.02, "fall of MIR within the horizon that is still worth going on for, at most 1000")
    warmup: int = _option(5, "evaluations at the start of a stage that no line is fitted to, step 0 included")
    horizon: float | None = _option(
        0.1, "how far ahead to look: a part of the planned run, or a number of steps; 0 or None: the window's length"
    )
    patience: int = _option(1, "evaluations in a row that must find the plateau")
    patience_steps: int = _option(0, "steps over which evaluations must have found the plateau")
    log_steps: bool = _option(False, "fit against the logarithm of the step, if MIR falls with every doubling")
    wait_for_schedule: bool = _option(
        True, "do not stop while a drop of the learning rate or another epoch lies ahead, as far as that is known"
    )
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
        for name in ("log_steps", "wait_for_schedule", "observe_only"):
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
                used if known: `max_steps`, `stage`, `next_drop`, `next_epoch`, `influences` with `probe_fingerprint`.

        Returns:
            The verdict; the same for the same history.

        Ranks: pure. In a run rank 0 decides and the others follow.
        """
        history = _History(as_records(records), self)
        return self._judge(history, len(history.records))

    def replay(self, records: Iterable[EvalRecord | Mapping[str, Any]]) -> Iterator[Verdict]:
        """The verdict after each evaluation of a history, as :meth:`verdict` gave it in the run; in linear time.

        Ranks: pure.
        """
        history = _History(as_records(records), self)
        for count in range(1, len(history.records) + 1):
            yield self._judge(history, count)

    def _judge(self, history: _History, count: int) -> Verdict:
        """The verdict on the first ``count`` records."""
        found = self._look(history, count)
        if found.kind != "plateau":
            return found
        patience = self._missing_patience(history, count)
        if patience:
            reason = f"{found.reason}; found so far by {patience}, as patience asks"
            return replace(found, kind="going on", reason=reason, summary=f"plateau ({patience})")
        return replace(found, observed=self.observe_only)

    def _missing_patience(self, history: _History, count: int) -> str | None:
        """How far patience has come where the latest evaluation found the plateau; None if it is satisfied."""
        last, flat = history.records[count - 1].step, 1
        since = last
        while flat < self.patience or last - since < self.patience_steps:
            if self._look(history, count - flat).kind != "plateau":
                break
            since = history.records[count - flat - 1].step
            flat += 1
        if flat < self.patience:
            return f"{flat} of {self.patience} evaluations"
        if last - since < self.patience_steps:
            return f"{last - since} of {self.patience_steps} steps"
        return None

    def _look(self, history: _History, count: int) -> Verdict:
        """What the first ``count`` records say, without patience."""
        if count not in history.looks:
            history.looks[count] = self._examine(history, count)
        return history.looks[count]

    def _examine(self, history: _History, count: int) -> Verdict:
        part = history.parts[count - 1] if count else _Part(0, self.warmup)
        if count and history.records[count - 1].mir is None:
            return Verdict("no data", "the latest evaluation gave no finite MIR")
        begin, end = int(history.finite[min(part.fit, count)]), int(history.finite[count])
        since = f"since {part.since}" if part.since else f"after {self.warmup} of warm-up"
        if end - begin < self.window:
            have = f"{end - begin} of {self.window}"
            return Verdict("no data", f"{have} evaluations in the window, {since}", summary=f"waiting ({have})")
        if history.disorder[end - 1] > history.disorder[begin]:
            return Verdict("no data", "the steps in the window do not increase; the history is damaged")
        steps, record = history.steps[begin:end], history.records[count - 1]
        horizon, words, is_counted = self._horizon(record.max_steps, steps)
        span = float(steps[-1] - steps[0])
        if span < horizon:
            since = since if part.since else "after the warm-up"
            return Verdict(
                "no data",
                f"evaluations {since} span {span:.0f} steps, less than {words}",
                summary=f"waiting ({span:.0f} of {horizon:.0f} steps)",
            )
        back = horizon if is_counted else _LOOK_BACK * horizon
        cells = history.cells(0.0 if is_counted else back / _CELLS)
        end = cells.settled(end)
        key = (part, end, horizon, is_counted)
        if key not in history.trends:
            history.trends[key] = self._trend(history, part, begin, end, cells, horizon, words, back)
        found, has_fallen = history.trends[key]
        early = self._too_early(history, count, has_fallen) if found.kind == "plateau" else None
        if early is None:
            return found
        return replace(found, kind="going on", reason=f"{found.reason}; {early[0]}", summary=early[1])

    def _trend(
        self,
        history: _History,
        part: _Part,
        begin: int,
        end: int,
        cells: Cells,
        horizon: float,
        words: str,
        back: float,
    ) -> tuple[Verdict, bool]:
        """The verdict of the line through evaluations up to ``end``, and whether MIR has fallen since its peak."""
        x, y = cells.until(begin, end) if end > begin else (_NONE, _NONE)
        if len(x) < self.window:
            have = f"{len(x)} of {self.window}"
            return Verdict("no data", f"{have} values in the window", summary=f"waiting ({have})"), False
        least = max(self.window, int(np.count_nonzero(x >= x[-1] - back)))
        x, y = x[-_GROWTH * least :], y[-_GROWTH * least :]
        last, ahead = float(history.steps[end - 1]), horizon
        fit = _Fit(np.log1p(x) if self.log_steps else x, y, functools.partial(history.influences, cells, end))
        if self.log_steps:
            ahead = math.log1p(horizon / (1.0 + last))
        most = max(least, int(np.count_nonzero(x >= x[-1] - _CHECKED_WINDOWS * back)))
        gain, error, size, noise = self._gain(fit, ahead, least, most)
        first = history.steps[cells.first[cells.of[end - 1] + 1 - size]]
        estimate = (
            f"in the next {words} MIR would {'fall' if gain >= 0 else 'rise'} by {abs(gain):.4f} (standard error "
            f"{error:.4f}), from {size} values, steps {first:.0f} to {last:.0f}"
        )
        kind, more, summary = self._weigh(gain, error)
        fallen = history.peak(cells, end) - median(y[-size:])
        if kind == "plateau":
            _, seen = cells.until(begin if part.since else int(history.finite[part.start]), end)
            above = level_above_best(seen[-_MEMORY_WINDOWS * size :], size)
            if above > self.min_delta:
                more, summary = f"level, but {above:.4f} above its recent lowest level", "level above its low"
                kind = "going on"
        reason = f"{estimate}; {more}" if more else estimate
        verdict = Verdict(kind, reason, gain, error, summary=summary)
        return verdict, fallen > self.min_delta + _PEAK_NOISE * noise

    def _too_early(self, history: _History, count: int, has_fallen: bool) -> tuple[str, str] | None:
        """Why a plateau does not end the run yet, and in a word or three; None if it does."""
        record, start = history.records[count - 1], history.parts[count - 1].start
        if self.wait_for_schedule:
            for ahead, what in (
                (record.next_drop, "the learning rate will drop"),
                (record.next_epoch, "an epoch begins"),
            ):
                if ahead is not None and ahead >= record.step:
                    return f"but {what} at step {ahead}", f"level, waits for step {ahead}"
        if self.horizon is None:
            return None
        why = "" if has_fallen else "MIR has not begun to fall and "
        if record.max_steps is None:
            done = int(history.finite[count] - history.finite[start])
            needed = self.warmup + _UNFALLEN_WINDOWS * self.window
            enough = has_fallen or done >= needed
            return None if enough else (f"but {why}there are {done} of {needed} evaluations", "level, not fallen yet")
        begin = history.records[start].step
        earliest = math.ceil(begin + (_EARLIEST if has_fallen else _EARLIEST_UNFALLEN) * (record.max_steps - begin))
        if record.step >= earliest:
            return None
        return f"but {why}step {earliest} is not reached", f"level, waits for step {earliest}"

    def _horizon(self, planned: float | None, steps: Array) -> tuple[float, str, bool]:
        """Length of the horizon in steps, in words, and whether it is counted in evaluations."""
        if self.horizon is not None and self.horizon >= 1:
            return float(self.horizon), f"{self.horizon:.0f} steps", False
        if self.horizon is not None and planned is not None and _is_positive(planned):
            return self.horizon * planned, f"{self.horizon * planned:.0f} steps ({self.horizon:.0%} of the run)", False
        length = float(steps[-1] - steps[-self.window])
        return length, f"{length:.0f} steps", True

    def _gain(self, fit: _Fit, ahead: float, least: int, checked: int) -> tuple[float, float, int, float]:
        """Expected fall over the horizon, its standard error, how many values it comes from, and their noise."""
        recent = slice(-_NOISE_WINDOWS * least, None)
        noise = scatter(fit.x[recent], fit.y[recent])
        wanted = _SHARE * self.min_delta / (_STANDARD_ERRORS * ahead)
        count = window_for(fit.x, noise, wanted, least, len(fit.x))
        near = fit.line(count, noise, ahead)
        longer = min(max(count, checked), len(fit.x))
        far = fit.line(longer, noise, ahead)
        clear = max(_BEND, _BEND_IN_NOISE * near[1] / self.min_delta) * near[1]
        if abs(far[0]) >= self.min_delta and abs(far[0] - near[0]) <= clear:
            return *far, longer, noise
        return *near, count, noise

    def _weigh(self, gain: float, error: float) -> tuple[VerdictKind, str, str]:
        """The kind of verdict, what decided it, and a summary in a word or three."""
        margin = _STANDARD_ERRORS * error
        if gain + margin < 0 and gain < -_NEGLIGIBLE_RISE * self.min_delta:
            return "rising", "", "rising"
        if abs(gain) + margin < self.min_delta:
            return "plateau", f"confidently below min_delta={self.min_delta}", "plateau"
        if margin >= self.min_delta and abs(gain) <= margin:
            remedy = "evaluate more often, use more samples or a larger min_delta"
            return "too noisy", f"too uncertain to compare with min_delta={self.min_delta}: {remedy}", "too noisy"
        reason = f"not confidently below min_delta={self.min_delta}"
        return "going on", reason, "falling" if gain > 0 else "not level yet"


@dataclass(frozen=True)
class _Part:
    """Where a record stands: the first record of its stage, the first that a line is fitted to, and why from there."""

    start: int
    fit: int
    since: str = ""


class _History:
    """The records of a run as arrays, made once for the verdicts on all of its beginnings."""

    def __init__(self, records: Records, rule: PlateauRule) -> None:
        self.records = records
        self.looks: dict[int, Verdict] = {}
        self.trends: dict[tuple[_Part, int, float, bool], tuple[Verdict, bool]] = {}
        self._cells: tuple[float, Cells] | None = None  # the last alone: a plan may change with every record
        self._peaks: tuple[Cells, Array] | None = None
        self._rows: dict[tuple[int, int], tuple[Any, Any]] = {}
        self.parts, cuts = _parts(records, rule)
        is_finite = np.array([record.mir is not None for record in records], dtype=bool)
        self.finite = np.concatenate([[0], np.cumsum(is_finite)])  # evaluations with a value before each record
        self._measured = [record for record in records if record.mir is not None]
        self.steps = np.array([record.step for record in self._measured], dtype=np.float64)
        self._values = np.array([record.mir for record in self._measured], dtype=np.float64)
        self.disorder = np.concatenate([[0], np.cumsum(np.diff(self.steps) <= 0)])
        self._segment = np.searchsorted(cuts, np.flatnonzero(is_finite), side="right")
        self._stage = np.array([part.start for part in self.parts], dtype=np.intp)[is_finite]

    def cells(self, width: float) -> Cells:
        """The evaluations put together in parts of so many steps."""
        if self._cells is None or self._cells[0] != width:
            self._cells = width, Cells(self.steps, self._values, self._segment, width)
        return self._cells[1]

    def peak(self, cells: Cells, end: int) -> float:
        """The highest median of three neighbouring cells of a stage, the one that evaluation ``end`` ends left out."""
        if self._peaks is None or self._peaks[0] is not cells:
            stage, peaks = self._stage[cells.first[:-1]], np.full(len(cells.y), -math.inf)
            for last in range(2, len(peaks)):
                if stage[last] == stage[last - 2]:
                    peaks[last] = max(peaks[last - 1], sorted(cells.y[last - 2 : last + 1])[1])
            self._peaks = cells, peaks
        return float(self._peaks[1][cells.of[end - 1] - 1])

    def influences(self, cells: Cells, end: int, count: int) -> Array | None:
        """(count, S) of the last cells before an evaluation, if every evaluation has them, of the same samples."""
        last = cells.of[end - 1]
        rows = [self._row(cells, number, end) for number in range(last + 1 - count, last + 1)]
        if len({samples for samples, _ in rows}) > 1 or rows[0][0] is None:
            return None
        return np.array([row for _, row in rows])

    def _row(self, cells: Cells, number: int, end: int) -> tuple[Any, Any]:
        """Which samples the influences in a cell are of, and their mean; None if any are missing or differ."""
        inside = int(cells.first[number]), min(int(cells.first[number + 1]), end)
        if inside not in self._rows:
            records = self._measured[slice(*inside)]
            kinds = {(each.probe_fingerprint, len(each.influences or ())) for each in records}
            is_whole = len(kinds) == 1 and all(count > 1 for _, count in kinds)
            mean = np.mean([np.asarray(each.influences) for each in records], axis=0) if is_whole else None
            self._rows[inside] = (kinds.pop() if is_whole else None, mean)
        return self._rows[inside]


@dataclass(frozen=True)
class _Fit:
    """What lines are fitted to."""

    x: Array
    y: Array
    influences: Callable[[int], Array | None]  # of the last so many values, see `_History.influences`

    def line(self, count: int, noise: float, ahead: float) -> tuple[float, float]:
        """Expected fall along the line through the last values, and its standard error; ``noise`` is a lower bound."""
        x, y, influences = self.x[-count:], self.y[-count:], self.influences(count)
        slope = theil_sen_slope(x, y)
        noise = max(noise, residual_scatter(x, y, slope))
        sampling = paired_error(x, influences) if influences is not None else 0.0
        return -slope * ahead, math.hypot(noise / spread(x), sampling) * ahead


def _parts(records: Records, rule: PlateauRule) -> tuple[list[_Part], NDArray[np.intp]]:
    """For each record where it stands, and the records that evaluations before them are never put together with.

    A stage begins where `stage` changes; a record without it belongs to the stage before.
    """
    part, marker, parts, cuts = _Part(0, rule.warmup), None, list[_Part](), {rule.warmup}
    for number, record in enumerate(records):
        if None not in (marker, record.stage) and marker != record.stage:
            part = _Part(number, number + rule.warmup)
        elif number and rule.wait_for_schedule and (since := _passed(records[number - 1], record.step)):
            part = _Part(part.start, max(part.fit, number), since)
        marker = marker if record.stage is None else record.stage
        parts.append(part)
        cuts |= {part.start, part.fit}
    return parts, np.array(sorted(cuts), dtype=np.intp)


def _passed(record: EvalRecord, step: int) -> str:
    """The change in the plan that lies between a record and a later step; empty if there is none."""
    if record.next_drop is not None and record.next_drop < step:
        return f"the learning rate dropped at step {record.next_drop}"
    if record.next_epoch is not None and record.next_epoch < step:
        return f"an epoch began at step {record.next_epoch}"
    return ""


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _check_integer(name: str, value: object, least: int, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r}: give a whole number of {unit}, {least} or more")
