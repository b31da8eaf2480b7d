# SPDX-License-Identifier: Apache-2.0
"""Compare runs: who has the lower MIR at an equal place, is that more than noise, and who could have stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Protocol

from mir_callback.analysis.curves import (
    AXES,
    Axis,
    Curve,
    Point,
    common_range,
    comparable_records,
    curves_over,
    mismatch,
    other_circumstances,
    value_at,
)
from mir_callback.analysis.load import Run
from mir_callback.analysis.statistics import Difference, RunNoise, differences, ranks, run_noise
from mir_callback.early_stopping import PlateauRule, Verdict
from mir_callback.errors import ConfigError, HistoryError
from mir_callback.history import Record, stopped


class StopRule(Protocol):
    """What `PlateauRule` is, or a rule of one's own."""

    def verdict(self, history: Sequence[Mapping[str, Any]]) -> Verdict:
        """Judge a history."""
        ...


@dataclass(frozen=True)
class Stop:
    """Where a rule would have ended a run, judging after each evaluation as it does in training.

    Attributes:
        step: of the evaluation after which it would have stopped, or None if it would not have.
        reason: the rule's, there or at the run's end.
        end: the run's last step that was evaluated.
        saved_steps: steps not taken; 0 without a stop.
        saved_share: of the steps the run took.
        saved_seconds: training time not spent, or None where the run does not know it.
        mir: at the stop, or None.
        given_away: how much lower MIR was at the run's end than at the stop; negative if it was higher. None without a
            stop.
    """

    step: int | None
    reason: str
    end: int
    saved_steps: int
    saved_share: float
    saved_seconds: float | None
    mir: float | None
    given_away: float | None


def stop_of(records: Sequence[Mapping[str, Any]], rule: StopRule) -> Stop:
    """Judge a run's evaluations one after the other.

    Args:
        records: of a run, at least one, failed ones included.
        rule: the stop rule.

    Ranks: pure.
    """
    last = records[-1]
    verdict = Verdict("no data", "")
    for count in range(1, len(records) + 1):
        verdict = rule.verdict(records[:count])
        if verdict.stop:
            return _stop_at(records[count - 1], records, verdict.reason)
    return Stop(None, f"{verdict.kind}: {verdict.reason}", last["step"], 0, 0.0, 0.0, None, None)


def _stop_at(record: Mapping[str, Any], records: Sequence[Mapping[str, Any]], reason: str) -> Stop:
    last = records[-1]
    saved = last["step"] - record["step"]
    final = next(later["mir"] for later in reversed(records) if later["mir"] is not None)
    return Stop(
        record["step"],
        reason,
        last["step"],
        saved,
        saved / last["step"] if last["step"] else 0.0,
        _seconds_between(record, last),
        record["mir"],
        None if record["mir"] is None else record["mir"] - final,
    )


def _seconds_between(record: Mapping[str, Any], last: Mapping[str, Any]) -> float | None:
    """Training time between two evaluations; `elapsed` starts anew with every process, and may have gone back."""
    for clock in ("train_seconds", "elapsed"):
        start, end = record.get(clock), last.get(clock)
        if start is not None and end is not None and end >= start:
            return float(end - start)
    return None


DEFAULT_LEVEL = 0.05
_MOST_SD = 1e6
_SAME_VALUE = 2e-6  # what lies between a live value and that of its checkpoint
# Runs of one recipe take the same work a step; where their times differ more, time says something of the machine.
_UNEVEN = 1.5


@dataclass(frozen=True)
class Recipe:
    """What is compared: one run, or several that differ in nothing but the seed.

    Attributes:
        name: what to call it.
        runs: its runs, at least one.
    """

    name: str
    runs: tuple[Run, ...]

    def label(self, run: Run) -> str:
        """What to call one of its runs among those of other recipes."""
        if len(self.runs) == 1 and run.name == self.name:
            return self.name
        return f"{self.name}: {run.name.removeprefix(self.name + '/')}"


@dataclass(frozen=True)
class AxisResult:
    """Recipes at an equal place of one axis.

    Attributes:
        axis: "step", "tokens", "samples" or "time".
        clock: the field of a record it is read from.
        place: where, or None if they have no place in common.
        members: indices of the recipes that know this axis, in the order of what follows.
        points: for each member the values of its runs there.
        noise: between runs of one recipe.
        pairs: the differences between members, judged together; their indices are those of ``members``.
        ranks: for each member; ties where the noise forbids a difference.
        told: what to know about it, in sentences.
        doubt: why something else than the recipes may decide places on it, as a busy machine does over time; or None.
    """

    axis: Axis
    clock: str
    place: float | None
    members: tuple[int, ...]
    points: tuple[tuple[Point, ...], ...] = ()
    noise: RunNoise | None = None
    pairs: tuple[Difference, ...] = ()
    ranks: tuple[int, ...] = ()
    told: tuple[str, ...] = ()
    doubt: str | None = None

    def mean(self, member: int) -> float:
        """MIR of a member, the mean over its runs."""
        return math.fsum(point.mir for point in self.points[member]) / len(self.points[member])


@dataclass(frozen=True)
class Comparison:
    """All that a comparison found.

    Attributes:
        recipes: in the order given; their runs hold only records that can be compared with each other.
        by: the axis that the ranking is by.
        axes: the axes that at least two recipes know (or one, if there is only one).
        stops: for each recipe and each of its runs, where the stop rule would have ended it.
        rule: the stop rule, in words.
        level: of the whole family of differences on an axis.
        mismatch: why values are not alike although they were compared, as a sentence; None if they are.
        remarks: what was found on the way, in sentences.
    """

    recipes: tuple[Recipe, ...]
    by: Axis
    axes: tuple[AxisResult, ...]
    stops: tuple[tuple[Stop, ...], ...]
    rule: str
    level: float
    mismatch: str | None
    remarks: tuple[str, ...]

    @property
    def ranking(self) -> AxisResult | None:
        """The result on the axis that the ranking is by, None if nothing can be ranked."""
        found = [result for result in self.axes if result.axis == self.by and result.ranks]
        return found[0] if found and len(self.recipes) > 1 else None


def compare(
    recipes: Sequence[Recipe | Run],
    *,
    by: Axis = "step",
    at: float | None = None,
    rule: StopRule | None = None,
    level: float = DEFAULT_LEVEL,
    seed_sd: float | None = None,
    anyway: bool = False,
) -> Comparison:
    """Compare recipes by their MIR.

    Args:
        recipes: runs, or recipes of several runs that differ in nothing but the seed.
        by: the axis that the ranking is by: "step", "tokens", "samples" or "time".
        at: where on it; by default the last place that all runs have reached.
        rule: the stop rule to try on every run; by default `PlateauRule()`.
        level: probability of calling any difference real where only the seed differs.
        seed_sd: standard deviation of MIR between runs that differ in the seed only, if it is known; by default it is
            measured on replicates, or assumed where there are none.
        anyway: compare values made with different probes, roots or other definitions too; the result says so.

    Returns:
        The comparison. With one recipe it describes it.

    Raises:
        ConfigError: an option breaks its rule.
        HistoryError: there is no run with a value, or values are not alike and ``anyway`` is False.

    Ranks: pure.
    """
    _check(by, at, level, seed_sd)
    rule = PlateauRule() if rule is None else rule
    remarks: list[str] = []
    kept = _with_values([r if isinstance(r, Recipe) else Recipe(r.name, (r,)) for r in recipes], remarks)
    runs = [run for recipe in kept for run in recipe.runs]
    why = mismatch(runs)
    if why is not None and not anyway:
        raise HistoryError(
            f"{why}; such values are not compared: measure the runs with one probe (mir eval), leave "
            "some out, or say --anyway"
        )
    remarks += other_circumstances(runs)
    ended = [(run.name, run.records[-1]["step"]) for run in runs if stopped(run.records)]
    remarks += [f"{name} was stopped at step {step} by its own rule" for name, step in ended]
    results = [_on_axis(axis, kept, at if axis == by else None, level, seed_sd) for axis in AXES]
    remarks += _same_in_several(kept)
    stops = tuple(tuple(stop_of(_with_plan(run, remarks), rule) for run in recipe.runs) for recipe in kept)
    known = tuple(result for result in results if result is not None)
    if by not in {result.axis for result in known}:
        remarks.append(f"not ranked: fewer than two runs know their place by {by}; choose another axis")
    return Comparison(tuple(kept), by, known, stops, repr(rule), level, why, tuple(remarks))


def _check(by: str, at: float | None, level: float, seed_sd: float | None) -> None:
    if by not in AXES:
        raise ConfigError(f"by must be one of {', '.join(AXES)}, got {by!r}; use 'step'")
    if at is not None and not (math.isfinite(at) and at >= 0):
        raise ConfigError(
            f"at must be a place of at least 0 on the axis, got {at}; leave it out for the last common one"
        )
    if not 0 < level < 1:
        raise ConfigError(f"level must be a probability between 0 and 1, got {level}; use e.g. {DEFAULT_LEVEL}")
    if seed_sd is not None and not 0 < seed_sd <= _MOST_SD:
        raise ConfigError(
            f"seed_sd must be a number of MIR above 0, at most {_MOST_SD:g}, got {seed_sd}; leave it out to have it "
            "assumed"
        )


def _with_values(recipes: Sequence[Recipe], remarks: list[str]) -> list[Recipe]:
    """Recipes of the runs that have values, each with the records of its newest definition."""
    kept = []
    for recipe in recipes:
        runs: list[Run] = []
        for run in recipe.runs:
            remarks += [f"{run.name}: {problem}" for problem in run.problems]
            if not run.measured:
                remarks.append(f"{run.name} is left out")
                continue
            records, told = comparable_records(run.records)
            remarks += [f"{run.name}: {sentence}" for sentence in told]
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
        raise HistoryError(
            "RUN must name at least one run with a value of MIR, got none: " + "; ".join(remarks or ["-"])
        )
    return kept


def _are_twins(run: Run, other: Run) -> bool:
    """Whether two runs are one: of one file, or with the same values wherever both were measured after step 0."""
    if run.source.resolve() == other.source.resolve():
        return True
    values = {record["step"]: record["mir"] for record in run.measured if record["step"] > 0}
    shared = [(values[r["step"]], r["mir"]) for r in other.measured if r["step"] in values]
    return bool(shared) and all(abs(one - another) <= _SAME_VALUE for one, another in shared)


def _same_in_several(recipes: Sequence[Recipe]) -> list[str]:
    """Runs that two recipes share, in sentences: a difference between these says nothing."""
    named = [(recipe, run) for recipe in recipes for run in recipe.runs]
    return [
        f"{run.name} and {other.name} are the same run, in {recipe.name} and in {another.name}"
        for (recipe, run), (another, other) in combinations(named, 2)
        if recipe is not another and run.source.resolve() == other.source.resolve()
    ]


def _with_plan(run: Run, remarks: list[str]) -> list[Record]:
    """A run's records, with the planned length of the run, which a stop rule looks ahead by, where they lack it."""
    if all(record.get("max_steps") is not None for record in run.records):
        return list(run.records)
    if run.max_steps is None:
        remarks.append(f"{run.name}: its planned length is unknown, so that a rule looks ahead by its window only")
        return list(run.records)
    planned = {"max_steps": run.max_steps}
    return [record if record.get("max_steps") is not None else {**record, **planned} for record in run.records]


def _on_axis(
    axis: Axis, recipes: Sequence[Recipe], at: float | None, level: float, seed_sd: float | None
) -> AxisResult | None:
    """The recipes that know an axis, at one place of it; None if fewer than two do (of several)."""
    runs = [run for recipe in recipes for run in recipe.runs]
    curves = iter(curves_over(axis, runs))
    groups: dict[int, list[Curve]] = {}
    told = []
    for index, recipe in enumerate(recipes):
        found = [next(curves) for _ in recipe.runs]
        known = [curve for curve in found if curve is not None]
        if len(known) == len(found):
            groups[index] = known
        else:
            told.append(f"{recipe.name} does not know its {axis}")
    if len(groups) < min(2, len(recipes)):
        return None
    members, flat = tuple(groups), [curve for group in groups.values() for curve in group]
    result = AxisResult(axis, flat[0].clock, None, members, told=tuple(told))
    shared = common_range(flat)
    if shared is None:
        reach = "; ".join(f"{c.run.name} from {c.places[0]:.10g} to {c.places[-1]:.10g}" for c in flat)
        return replace(result, told=(*told, f"the runs have no {axis} in common: {reach}"))
    place = shared[1] if at is None else at
    uneven = max(map(_spread_of_pace, groups.values())) if axis == "time" else 1.0
    if uneven > _UNEVEN:
        doubt = f"a step takes {uneven:.1f} times as long in one run as in another of the same recipe"
        result = replace(result, doubt=doubt)
    shortest = min(flat, key=lambda curve: curve.places[-1])
    if at is None and shortest.places[-1] < 0.9 * max(curve.places[-1] for curve in flat):
        told.append(f"compared as far as {shortest.run.name} has come")
    if not shared[0] <= place <= shared[1]:
        raise ConfigError(
            f"at must lie where all runs were measured, {axis} {shared[0]:.10g} to {shared[1]:.10g}, got {place:.10g}; "
            "leave it out for the last common one"
        )
    return _judged(replace(result, told=tuple(told)), list(groups.values()), place, level, seed_sd)


def _spread_of_pace(curves: Sequence[Curve]) -> float:
    """How much longer a step takes in the slowest of some runs than in the fastest; by time."""
    paces = []
    for curve in curves:
        steps = curve.records[-1]["step"] - curve.records[0]["step"]
        if steps > 0:
            paces.append((curve.places[-1] - curve.places[0]) / steps)
    return max(paces) / min(paces) if paces else 1.0


def _judged(
    result: AxisResult, groups: list[list[Curve]], place: float, level: float, seed_sd: float | None
) -> AxisResult:
    points = tuple(tuple(value_at(curve, place) for curve in curves) for curves in groups)
    noise = run_noise(groups, place, seed_sd)
    alike = [[mismatch([c.run for c in (*one, *other)]) is None for other in groups] for one in groups]
    pairs = tuple(differences(points, noise, level, alike))
    told = [*result.told, noise.told] if pairs else [*result.told]
    kinds = {pair.probe.kind for pair in pairs}
    if "unknown" in kinds:
        told.append("the probe's sampling error is not in the noise: some values have no standard error (mir_se)")
    if "unpaired" in kinds:
        told.append("the probe's sampling error is that of unpaired values, too large on a common probe: no influences")
    between = [
        c.run.name
        for curves, found in zip(groups, points, strict=True)
        for c, point in zip(curves, found, strict=True)
        if not point.measured
    ]
    if between:
        told.append(f"between two evaluations, on a straight line: {', '.join(between)}")
    return replace(
        result,
        place=place,
        points=points,
        noise=noise,
        pairs=pairs,
        ranks=tuple(ranks(len(groups), pairs)),
        told=tuple(told),
    )
