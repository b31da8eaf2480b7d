# SPDX-License-Identifier: Apache-2.0
"""Compare runs: who has the lower MIR at an equal position, is that more than noise, and who could have stopped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, islice

from mir_callback.analysis.curves import (
    AXES,
    Axis,
    Curve,
    Point,
    build_curves,
    find_common_range,
    find_mismatch,
    interpolate,
    keep_comparable,
    list_circumstances,
)
from mir_callback.analysis.load import Run
from mir_callback.analysis.statistics import Difference, RunNoise, estimate_run_noise, find_differences, rank
from mir_callback.early_stopping import PlateauRule, Verdict
from mir_callback.errors import ConfigError, HistoryError
from mir_callback.record import EvalRecord, is_stopped

DEFAULT_LEVEL = 0.05
_MAX_STD = 1e6
_SAME_VALUE = 2e-6  # what lies between a live value and that of its checkpoint
# Runs of one recipe take the same work a step; where their times differ more, time says something of the machine.
_UNEVEN = 1.5


@dataclass(frozen=True)
class Recipe:
    """What is compared: one run, or several that differ in nothing but the seed."""

    name: str
    runs: tuple[Run, ...]

    def label(self, run: Run) -> str:
        """What to call one of its runs among those of other recipes."""
        if len(self.runs) == 1 and run.name == self.name:
            return self.name
        return f"{self.name}: {run.name.removeprefix(self.name + '/')}"


@dataclass(frozen=True)
class Stop:
    """Where a rule would have ended a run, judging after each evaluation as it does in training."""

    step: int | None  # of the evaluation after which it would have stopped, or None if it would not have
    reason: str  # the rule's, there or at the run's end
    end: int  # the run's last step that was evaluated
    saved_steps: int = 0
    saved_share: float = 0.0  # of the steps the run took
    saved_seconds: float | None = 0.0  # training time not spent, or None where the run does not know it
    mir: float | None = None  # at the stop
    missed_gain: float | None = None  # by how much MIR still fell until the run's end; negative if it rose


@dataclass(frozen=True)
class AxisResult:
    """Recipes at an equal position of one axis."""

    axis: Axis
    clock: str  # the field of a record it is read from
    x: float | None  # the position, or None if they have none in common
    members: tuple[int, ...]  # indices of the recipes that know this axis, in the order of what follows
    points: tuple[tuple[Point, ...], ...] = ()  # for each member the values of its runs there
    noise: RunNoise | None = None  # between runs of one recipe
    pairs: tuple[Difference, ...] = ()  # between members, by their index in ``members``, judged together
    ranks: tuple[int, ...] = ()  # for each member; ties where the noise forbids a difference
    messages: tuple[str, ...] = ()  # what to know about it, in sentences
    doubt: str | None = None  # why something else than the recipes may decide it, as a busy machine does over time

    def mean(self, member: int) -> float:
        """MIR of a member, the mean over its runs."""
        return math.fsum(point.mir for point in self.points[member]) / len(self.points[member])


@dataclass(frozen=True)
class Comparison:
    """All that a comparison found."""

    recipes: tuple[Recipe, ...]  # in the order given; their runs hold only records that can be compared
    by: Axis  # what the ranking is by
    axes: tuple[AxisResult, ...]  # those that at least two recipes know (or one, if there is only one)
    stops: tuple[tuple[Stop, ...], ...]  # for each recipe and each of its runs
    rule: str  # the stop rule, in words
    level: float  # of the whole family of differences on an axis
    mismatch: str | None  # why values are not alike although they were compared, as a sentence; None if they are
    remarks: tuple[str, ...]  # what was found on the way, in sentences

    @property
    def ranking(self) -> AxisResult | None:
        """The result on the axis that the ranking is by, None if nothing can be ranked."""
        found = (result for result in self.axes if result.axis == self.by and result.ranks and len(self.recipes) > 1)
        return next(found, None)


def compare(
    recipes: Sequence[Recipe | Run],
    *,
    by: Axis = "step",
    at: float | None = None,
    rule: PlateauRule | None = None,
    level: float = DEFAULT_LEVEL,
    seed_std: float | None = None,
    allow_mismatch: bool = False,
) -> Comparison:
    """Compare recipes by their MIR.

    Args:
        recipes: runs, or recipes of several runs that differ in nothing but the seed.
        by: the axis that the ranking is by: "step", "tokens", "samples" or "time".
        at: where on it; by default the last position that all runs have reached.
        rule: the stop rule to try on every run; by default `PlateauRule()`.
        level: probability of calling any difference real where only the seed differs.
        seed_std: standard deviation of MIR between runs that differ in the seed only, if it is known; by default it is
            measured on replicates, or assumed where there are none.
        allow_mismatch: compare values made with different probes, roots or other definitions too; the result says so.

    Returns:
        The comparison. With one recipe it describes it.

    Raises:
        ConfigError: an option breaks its rule.
        HistoryError: there is no run with a value, or values are not alike and ``allow_mismatch`` is False.

    Ranks: pure.
    """
    _check(by, at, level, seed_std)
    rule = PlateauRule() if rule is None else rule
    remarks: list[str] = []
    kept = _keep_measured(
        [each if isinstance(each, Recipe) else Recipe(each.name, (each,)) for each in recipes], remarks
    )
    runs = [run for recipe in kept for run in recipe.runs]
    mismatch = find_mismatch(runs)
    if mismatch is not None and not allow_mismatch:
        raise HistoryError(
            f"{mismatch}; measure the runs with one probe (mir eval), leave some out, or use --allow-mismatch"
        )
    remarks += list_circumstances(runs)
    stopped = [(run.name, run.records[-1].step) for run in runs if is_stopped(run.records)]
    remarks += [f"{name} was stopped at step {step} by its own rule" for name, step in stopped]
    results = [_compare_on(axis, kept, at if axis == by else None, level, seed_std) for axis in AXES]
    remarks += _shared_runs(kept)
    stops = tuple(tuple(find_stop(_with_plan(run, remarks), rule) for run in recipe.runs) for recipe in kept)
    known = tuple(result for result in results if result is not None)
    if by not in {result.axis for result in known}:
        remarks.append(f"not ranked: fewer than two runs know their position by {by}; choose another axis")
    return Comparison(tuple(kept), by, known, stops, repr(rule), level, mismatch, tuple(remarks))


def find_stop(records: Sequence[EvalRecord], rule: PlateauRule) -> Stop:
    """Judge a run's evaluations, at least one, failed ones included, one after the other."""
    last = records[-1]
    verdict = Verdict("no data", "")
    for count, record in enumerate(records, start=1):
        verdict = rule.verdict(records[:count])
        if verdict.stop:
            saved, seconds = last.step - record.step, _seconds_between(record, last)
            final = next(later.mir for later in reversed(records) if later.mir is not None)
            gain = None if record.mir is None else record.mir - final
            share = saved / last.step if last.step else 0.0
            return Stop(record.step, verdict.reason, last.step, saved, share, seconds, record.mir, gain)
    return Stop(None, f"{verdict.kind}: {verdict.reason}", last.step)


def _seconds_between(record: EvalRecord, last: EvalRecord) -> float | None:
    """Training time between two evaluations; `elapsed` starts anew with every process, and may have gone back."""
    for start, end in ((record.train_seconds, last.train_seconds), (record.elapsed, last.elapsed)):
        if start is not None and end is not None and end >= start:
            return float(end - start)
    return None


def _check(by: str, at: float | None, level: float, seed_std: float | None) -> None:
    if by not in AXES:
        raise ConfigError(f"runs can be compared by {', '.join(AXES)}, not by {by!r}")
    if at is not None and not (math.isfinite(at) and at >= 0):
        raise ConfigError(f"at is a position on the axis, 0 or more, got {at}; leave it out for the last common one")
    if not 0 < level < 1:
        raise ConfigError(f"level is a probability between 0 and 1, got {level}; use e.g. {DEFAULT_LEVEL}")
    if seed_std is not None and not 0 < seed_std <= _MAX_STD:
        raise ConfigError(
            f"seed_std is a standard deviation of MIR, above 0 and at most {_MAX_STD:g}, got {seed_std}; leave it "
            "out to have it assumed"
        )


def _keep_measured(recipes: Sequence[Recipe], remarks: list[str]) -> list[Recipe]:
    """Recipes of the runs that have values, each with the records of its newest definition, and each once."""
    kept = []
    for recipe in recipes:
        runs: list[Run] = []
        for run in recipe.runs:
            remarks += [f"{run.name}: {problem}" for problem in run.problems]
            if not run.measured:
                remarks.append(f"{run.name} is left out")
                continue
            records, messages = keep_comparable(run.records)
            remarks += [f"{run.name}: {message}" for message in messages]
            own = replace(run, records=tuple(records))
            twin = next((number for number, other in enumerate(runs) if _are_twins(other, own)), None)
            if twin is None:
                runs.append(own)
                continue
            runs[twin], less = sorted((runs[twin], own), key=lambda one: len(one.measured), reverse=True)
            remarks.append(
                f"{less.name} is left out, it has the values of {runs[twin].name}: a copy, or the same seed again"
            )
        if runs:
            kept.append(Recipe(recipe.name, tuple(runs)))
    if not kept:
        raise HistoryError(f"no run has a value of MIR to compare: {'; '.join(remarks or ['none is named'])}")
    return kept


def _are_twins(run: Run, other: Run) -> bool:
    """Whether two runs are one: of one file, or with the same values wherever both were measured after step 0."""
    if run.source.resolve() == other.source.resolve():
        return True
    ours, theirs = (
        {record.step: float(record.mir or 0.0) for record in one.records if record.is_trained} for one in (run, other)
    )
    shared = ours.keys() & theirs.keys()
    return bool(shared) and all(abs(ours[step] - theirs[step]) <= _SAME_VALUE for step in shared)


def _shared_runs(recipes: Sequence[Recipe]) -> list[str]:
    """Runs that two recipes share, in sentences: a difference between these says nothing."""
    named = [(recipe, run) for recipe in recipes for run in recipe.runs]
    return [
        f"{run.name} and {other.name} are the same run, in {recipe.name} and in {another.name}"
        for (recipe, run), (another, other) in combinations(named, 2)
        if recipe is not another and run.source.resolve() == other.source.resolve()
    ]


def _with_plan(run: Run, remarks: list[str]) -> list[EvalRecord]:
    """A run's records, with the planned length of the run, which a stop rule looks ahead by, where they lack it."""
    if run.max_steps is None and any(record.max_steps is None for record in run.records):
        remarks.append(f"{run.name}: its planned length is unknown, so that a rule looks ahead by its window only")
    return [
        record if record.max_steps is not None else replace(record, max_steps=run.max_steps) for record in run.records
    ]


def _compare_on(
    axis: Axis, recipes: Sequence[Recipe], at: float | None, level: float, seed_std: float | None
) -> AxisResult | None:
    """The recipes that know an axis, at one position of it; None if fewer than two do (of several)."""
    curves = iter(build_curves(axis, [run for recipe in recipes for run in recipe.runs]))
    groups: dict[int, list[Curve]] = {}
    messages = []
    for index, recipe in enumerate(recipes):
        found = [curve for curve in islice(curves, len(recipe.runs)) if curve is not None]
        if len(found) == len(recipe.runs):
            groups[index] = found
        else:
            messages.append(f"{recipe.name} does not know its {axis}")
    if len(groups) < min(2, len(recipes)):
        return None
    flat = list(chain(*groups.values()))
    result = AxisResult(axis, flat[0].clock, None, tuple(groups))
    shared = find_common_range(flat)
    if shared is None:
        reach = "; ".join(f"{curve.run.name} from {curve.x[0]:.10g} to {curve.x[-1]:.10g}" for curve in flat)
        return replace(result, messages=(*messages, f"the runs have no {axis} in common: {reach}"))
    shortest = min(flat, key=lambda curve: curve.x[-1])
    if at is None and shortest.x[-1] < 0.9 * max(curve.x[-1] for curve in flat):
        messages.append(f"compared as far as {shortest.run.name} has come")
    x = shared[1] if at is None else at
    if not shared[0] <= x <= shared[1]:
        raise ConfigError(
            f"at={x:.10g} is not where all runs were measured, {axis} {shared[0]:.10g} to {shared[1]:.10g}; leave it "
            "out for the last common one"
        )
    uneven = max(map(_spread_of_pace, groups.values())) if axis == "time" else 1.0
    doubt = f"a step takes {uneven:.1f} times as long in one run as in another of the same recipe"
    result = _judge(result, list(groups.values()), x, level, seed_std)
    return replace(result, doubt=doubt if uneven > _UNEVEN else None, messages=(*messages, *result.messages))


def _spread_of_pace(curves: Sequence[Curve]) -> float:
    """How much longer a step takes in the slowest of some runs than in the fastest; by time."""
    taken = [(curve.x[-1] - curve.x[0], curve.records[-1].step - curve.records[0].step) for curve in curves]
    paces = [seconds / steps for seconds, steps in taken if steps > 0]
    return max(paces) / min(paces) if paces else 1.0


def _judge(result: AxisResult, groups: list[list[Curve]], x: float, level: float, seed_std: float | None) -> AxisResult:
    """The result with the values at ``x``, their differences and ranks."""
    points = tuple(tuple(interpolate(curve, x) for curve in curves) for curves in groups)
    noise = estimate_run_noise(groups, x, seed_std)
    alike = [[find_mismatch([curve.run for curve in one + other]) is None for other in groups] for one in groups]
    pairs = tuple(find_differences(points, noise, level, alike))
    messages = [noise.message] if pairs else []
    kinds = {pair.probe.kind for pair in pairs}
    if "unknown" in kinds:
        messages.append("the probe's sampling error is not in the noise: some values have no standard error (mir_se)")
    if "unpaired" in kinds:
        messages.append(
            "the probe's sampling error is that of unpaired values, too large on a common probe: no influences"
        )
    named = zip(chain(*groups), chain(*points), strict=True)
    between = [curve.run.name for curve, point in named if not point.measured]
    if between:
        messages.append(f"between two evaluations, on a straight line: {', '.join(between)}")
    ranks = tuple(rank(len(groups), pairs))
    return replace(result, x=x, points=points, noise=noise, pairs=pairs, ranks=ranks, messages=tuple(messages))
