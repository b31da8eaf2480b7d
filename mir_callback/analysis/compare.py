# SPDX-License-Identifier: Apache-2.0
"""Compare runs: MIR at an equal position, whether differences are beyond noise, and where runs could have stopped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, islice
from statistics import stdev

from mir_callback.analysis.curves import (
    AXES,
    Axis,
    Curve,
    Point,
    build_curves,
    few,
    find_common_range,
    find_mismatch,
    interpolate,
    keep_comparable,
    list_circumstances,
)
from mir_callback.analysis.load import Run, Seed
from mir_callback.analysis.statistics import Difference, find_differences, rank
from mir_callback.early_stopping import PlateauRule, Verdict
from mir_callback.errors import ConfigError, HistoryError
from mir_callback.record import EvalRecord, is_stopped
from mir_callback.second_opinion import find_contradiction

DEFAULT_LEVEL = 0.05
_MAX_STD = 1e6
_SAME_VALUE = 2e-6  # largest difference between a value from training and that of its checkpoint
# Runs of one recipe do the same work per step: if their step times differ by more, the machines differed.
_UNEVEN = 1.5


@dataclass(frozen=True)
class Recipe:
    """One run, or several that differ only in the seed."""

    name: str
    runs: tuple[Run, ...]

    def label(self, run: Run) -> str:
        """The name of one of its runs in a table of all recipes."""
        if len(self.runs) == 1 and run.name == self.name:
            return self.name
        return f"{self.name}: {run.name.removeprefix(self.name + '/')}"


@dataclass(frozen=True)
class Stop:
    """Where a stop rule would have ended a run, applied after each evaluation as in training."""

    step: int | None  # of the evaluation it would have stopped at; None if it would not have stopped
    reason: str  # of the rule's last verdict
    end: int  # step of the last evaluation
    saved_steps: int = 0
    saved_share: float = 0.0  # fraction of the run's steps
    saved_seconds: float | None = 0.0  # of training time; None if not recorded
    mir: float | None = None  # at the stop
    missed_gain: float | None = None  # fall of MIR from there to the end; negative if it rose


@dataclass(frozen=True)
class AxisResult:
    """MIR of the recipes at an equal position on one axis."""

    axis: Axis
    clock: str  # the record field with the position
    x: float | None  # the position; None if the runs have none in common
    members: tuple[int, ...]  # indices of the recipes with positions on this axis
    points: tuple[tuple[Point, ...], ...] = ()  # for each member, the values of its runs
    # For each member the standard deviation of its runs, or the one given; None if it is unknown, of a single run.
    seed_stds: tuple[float | None, ...] = ()
    pairs: tuple[Difference, ...] = ()  # between members, by their index in ``members``; tested as one family
    ranks: tuple[int | None, ...] = ()  # for each member; equal if no difference is beyond noise, None if not tested
    messages: tuple[str, ...] = ()
    doubt: str | None = None  # why the axis may be misleading, e.g. time on machines of different speed

    def mean(self, member: int) -> float:
        """Mean MIR over the runs of a member."""
        return math.fsum(point.mir for point in self.points[member]) / len(self.points[member])


@dataclass(frozen=True)
class Comparison:
    """Result of :func:`compare`."""

    recipes: tuple[Recipe, ...]  # in the order given, with their comparable records only
    by: Axis  # axis of the ranking
    axes: tuple[AxisResult, ...]  # those that at least two recipes have (or the only one)
    stops: tuple[tuple[Stop, ...], ...]  # for each recipe and each of its runs
    rule: PlateauRule
    level: float  # significance level for all differences on an axis together
    mismatch: str | None  # with ``allow_mismatch``, why the values are not comparable
    remarks: tuple[str, ...]  # messages about what was skipped or assumed

    @property
    def ranking(self) -> AxisResult | None:
        """The result on the axis ``by``; None if nothing can be ranked."""
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
        recipes: runs, or recipes of several runs that differ only in the seed.
        by: axis of the ranking: "step", "tokens", "samples" or "time" (seconds of training).
        at: position on that axis; default: the last one that all runs have reached.
        rule: stop rule to try on every run; default: `PlateauRule()`.
        level: probability of reporting any difference if only the seeds differ.
        seed_std: standard deviation of MIR between seeds, if known. By default recipes of several runs are tested
            against one another, paired by seed where they share two or more, and a recipe of one run is not tested.
        allow_mismatch: also compare values of different probes, tokens or roots; the result says so.

    Returns:
        The comparison; of a single recipe, its description.

    Raises:
        ConfigError: an option is invalid.
        HistoryError: no run has a MIR, or the values are not comparable and ``allow_mismatch`` is False.

    Ranks: pure.

    Example:
        >>> from pathlib import Path
        >>> definition = {"probe_fingerprint": "p", "tokens_fingerprint": "t", "root": "exact"}
        >>> runs = [
        ...     Run(name, Path(name), Path(name), (EvalRecord(step=100, mir=mir, mir_se=0.01, **definition),))
        ...     for name, mir in (("a", 2.5), ("b", 4.5))
        ... ]  # or read_run("runs/a"), read_run("runs/b")
        >>> compare(runs, seed_std=0.1).ranking.ranks
        (1, 2)
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
            f"{mismatch}. Measure the runs on one probe (mir eval), leave some out, or pass --allow-mismatch."
        )
    remarks += list_circumstances(runs)
    stopped = [(run.name, run.records[-1].step) for run in runs if is_stopped(run.records)]
    remarks += [f"{name} was stopped by its stop rule at step {step}" for name, step in stopped]
    for run in runs:
        against = find_contradiction([record for record in run.planned if record.mir is not None])
        if against is not None:
            step = run.measured[-1].step
            remarks.append(f"{run.name}: vision gain contradicts MIR at step {step}: {against.message}")
    results = [_compare_on(axis, kept, at if axis == by else None, level, seed_std) for axis in AXES]
    remarks += _shared_runs(kept)
    stops = tuple(tuple(find_stop(_with_plan(run, remarks), rule) for run in recipe.runs) for recipe in kept)
    known = tuple(result for result in results if result is not None)
    if by not in {result.axis for result in known}:
        remarks.append(f"not ranked by {by}: fewer than two recipes have recorded it; choose another axis (--by)")
    return Comparison(tuple(kept), by, known, stops, rule, level, mismatch, tuple(remarks))


def find_stop(records: Sequence[EvalRecord], rule: PlateauRule) -> Stop:
    """Apply a stop rule to a run's evaluations (at least one; failed ones included) one after the other."""
    last = records[-1]
    verdict = Verdict("no data", "")
    for record, verdict in zip(records, rule.replay(records), strict=True):
        if verdict.stop:
            saved, seconds = last.step - record.step, _seconds_between(record, last)
            final = next(later.mir for later in reversed(records) if later.mir is not None)
            gain = None if record.mir is None else record.mir - final
            share = saved / last.step if last.step else 0.0
            return Stop(record.step, verdict.reason, last.step, saved, share, seconds, record.mir, gain)
    return Stop(None, f"{verdict.kind}: {verdict.reason}", last.step)


def _seconds_between(record: EvalRecord, last: EvalRecord) -> float | None:
    """Training time between two evaluations, in seconds; `elapsed` restarts with each process."""
    for start, end in ((record.train_seconds, last.train_seconds), (record.elapsed, last.elapsed)):
        if start is not None and end is not None and end >= start:
            return float(end - start)
    return None


def _check(by: str, at: float | None, level: float, seed_std: float | None) -> None:
    if by not in AXES:
        raise ConfigError(f"by must be one of {', '.join(AXES)}, got {by!r}")
    if at is not None and not (math.isfinite(at) and at >= 0):
        raise ConfigError(f"at must be a position of at least 0, got {at}. Leave it out for the last common one.")
    if not 0 < level < 1:
        raise ConfigError(f"level must be a probability between 0 and 1, got {level}; the default is {DEFAULT_LEVEL}")
    if seed_std is not None and not 0 < seed_std <= _MAX_STD:
        raise ConfigError(
            f"seed_std must be a standard deviation of MIR, above 0 and at most {_MAX_STD:g}, got {seed_std}. Leave it "
            "out to have it estimated."
        )


def _keep_measured(recipes: Sequence[Recipe], remarks: list[str]) -> list[Recipe]:
    """The recipes without runs that have no MIR or are copies, and without records of an older definition."""
    kept = []
    for recipe in recipes:
        runs: list[Run] = []
        for run in recipe.runs:
            remarks += [f"{run.name}: {problem}" for problem in run.problems]
            if not run.measured:
                remarks.append(f"skipped {run.name}")
                continue
            records, messages = keep_comparable(run.records)
            remarks += [f"{run.name}: {message}" for message in messages]
            own = replace(run, records=tuple(records))
            same = next((number for number, other in enumerate(runs) if _is_same_run(other, own)), None)
            if same is None:
                runs.append(own)
                continue
            runs[same], less = sorted((runs[same], own), key=lambda one: len(one.measured), reverse=True)
            remarks.append(
                f"skipped {less.name}: its values equal those of {runs[same].name} (a copy or the same seed)"
            )
        if runs:
            kept.append(Recipe(recipe.name, tuple(runs)))
    if not kept:
        raise HistoryError(f"No run has a MIR to compare: {'; '.join(remarks or ['none was given'])}.")
    return kept


def _is_same_run(run: Run, other: Run) -> bool:
    """Whether two runs are the same: one file, or equal values at all steps after 0 that both have measured."""
    if run.source.resolve() == other.source.resolve():
        return True
    ours, theirs = (
        {record.step: float(record.mir or 0.0) for record in one.records if record.is_after_start}
        for one in (run, other)
    )
    shared = ours.keys() & theirs.keys()
    if None not in (run.seed, other.seed) and run.seed != other.seed:
        return False
    return bool(shared) and all(abs(ours[step] - theirs[step]) <= _SAME_VALUE for step in shared)


def _shared_runs(recipes: Sequence[Recipe]) -> list[str]:
    """Messages about runs that are in two recipes."""
    named = [(recipe, run) for recipe in recipes for run in recipe.runs]
    return [
        f"{run.name} and {other.name} are the same run, in both {recipe.name} and {another.name}"
        for (recipe, run), (another, other) in combinations(named, 2)
        if recipe is not another and run.source.resolve() == other.source.resolve()
    ]


def _with_plan(run: Run, remarks: list[str]) -> Sequence[EvalRecord]:
    """A run's records, with `max_steps` filled in, which a stop rule needs for its horizon."""
    if run.max_steps is None and any(record.max_steps is None for record in run.records):
        remarks.append(f"{run.name}: max_steps is unknown, so the stop rule uses its window as the horizon")
    return run.planned


def _compare_on(
    axis: Axis, recipes: Sequence[Recipe], at: float | None, level: float, seed_std: float | None
) -> AxisResult | None:
    """Compare the recipes that have an axis, at one position; None if fewer than two (of several) have it."""
    curves = iter(build_curves(axis, [run for recipe in recipes for run in recipe.runs]))
    groups: dict[int, list[Curve]] = {}
    messages = []
    for index, recipe in enumerate(recipes):
        found = [curve for curve in islice(curves, len(recipe.runs)) if curve is not None]
        if len(found) == len(recipe.runs):
            groups[index] = found
        else:
            messages.append(f"{recipe.name} has not recorded its {axis}")
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
        messages.append(f"compared at the end of the shortest run, {shortest.run.name}")
    x = shared[1] if at is None else at
    if not shared[0] <= x <= shared[1]:
        raise ConfigError(
            f"at={x:.10g} is outside of what all runs cover, {axis} {shared[0]:.10g} to {shared[1]:.10g}. Leave it out "
            "for the last common position."
        )
    uneven = max(map(_spread_of_pace, groups.values())) if axis == "time" else 1.0
    doubt = f"a step of one run took {uneven:.1f} times as long as in another of the same recipe"
    result = _judge(result, [recipes[index] for index in groups], list(groups.values()), x, level, seed_std)
    return replace(result, doubt=doubt if uneven > _UNEVEN else None, messages=(*messages, *result.messages))


def _spread_of_pace(curves: Sequence[Curve]) -> float:
    """Ratio of the step times of the slowest and the fastest run, from curves over time."""
    taken = [(curve.x[-1] - curve.x[0], curve.records[-1].step - curve.records[0].step) for curve in curves]
    paces = [seconds / steps for seconds, steps in taken if steps > 0]
    return max(paces) / min(paces) if paces else 1.0


def _judge(
    result: AxisResult,
    recipes: Sequence[Recipe],
    groups: list[list[Curve]],
    x: float,
    level: float,
    seed_std: float | None,
) -> AxisResult:
    """Fill in values at ``x``, differences and ranks."""
    points = tuple(tuple(interpolate(curve, x) for curve in curves) for curves in groups)
    alike = [[find_mismatch([curve.run for curve in one + other]) is None for other in groups] for one in groups]
    seeds = [[curve.run.seed for curve in curves] for curves in groups]
    pairs = tuple(find_differences(points, seeds, level, alike, seed_std))
    stds = tuple(_std_of(found) if seed_std is None else seed_std for found in points)
    messages = []
    if seed_std is not None and pairs:
        messages.append(f"SD between seeds {seed_std:.2g}, as given (--seed-std)")
    elif pairs:
        messages += _explain_tests(recipes, pairs, stds)
    means = [math.fsum(point.mir for point in found) / len(found) for found in points]
    messages += [
        f"{recipes[pair.one].name} - {recipes[pair.other].name}: the runs of shared seeds differ the other way than "
        "the means of all runs in the first table"
        for pair in pairs
        if pair.shared and pair.value * (means[pair.one] - means[pair.other]) < 0
    ]
    kinds = {pair.probe.kind for pair in pairs}
    if "unknown" in kinds:
        messages.append("the sampling error of the probe is not included: some values have no standard error (mir_se)")
    if "unpaired" in kinds:
        messages.append("the sampling error of the probe is overestimated: without influences it cannot be paired")
    named = zip(chain(*groups), chain(*points), strict=True)
    between = [curve.run.name for curve, point in named if not point.measured]
    if between:
        messages.append(f"interpolated between two evaluations: {', '.join(between)}")
    ranks = tuple(rank(len(groups), pairs))
    return replace(result, x=x, points=points, seed_stds=stds, pairs=pairs, ranks=ranks, messages=tuple(messages))


def _std_of(points: Sequence[Point]) -> float | None:
    return stdev(point.mir for point in points) if len(points) > 1 else None


def _explain_tests(recipes: Sequence[Recipe], pairs: Sequence[Difference], stds: Sequence[float | None]) -> list[str]:
    """Which differences are paired by seed, which are not and why, and which can't be tested."""
    messages = []
    paired: dict[str, list[str]] = {}
    apart: list[str] = []
    problems = [_unpairable(recipe) for recipe in recipes]
    for pair in pairs:
        one, other = recipes[pair.one], recipes[pair.other]
        name = f"{one.name} - {other.name}"
        if pair.shared:
            left_out = max(len(one.runs), len(other.runs)) > len(pair.shared)
            key = f"{', '.join(map(_format_seed, pair.shared))}{', without runs of other seeds' if left_out else ''}"
            paired.setdefault(key, []).append(name)
        elif pair.p is not None and problems[pair.one] is None and problems[pair.other] is None:
            apart.append(name)
    messages += [f"paired by seed ({seeds}): {few(found)}" for seeds, found in paired.items()]
    tested = {index for pair in pairs if pair.p is not None for index in (pair.one, pair.other)}
    messages += [
        f"{recipes[index].name} is not paired by seed: {problem}"
        for index, problem in enumerate(problems)
        if index in tested and problem is not None
    ]
    if apart:
        messages.append(f"not paired by seed, with fewer than two seeds in common (data seed included): {few(apart)}")
    if single := [recipe.name for recipe in recipes if len(recipe.runs) == 1]:
        sentence = (
            f"not tested, as one run does not show how far a seed moves MIR: {few(single)}; only replicates with other "
            "seeds can decide (NAME=RUN,RUN,...), or a known SD between seeds (--seed-std)"
        )
        measured = [(std, recipe.name) for std, recipe in zip(stds, recipes, strict=True) if std is not None]
        if measured:
            sentence += "; the largest SD between seeds here is {:.2g}, of {}".format(*max(measured))
        messages.append(sentence)
    return messages


def _unpairable(recipe: Recipe) -> str | None:
    """Why the runs of a recipe can't be paired with others by their seeds; None if they can."""
    for run in recipe.runs:
        if run.seed is None:
            listed = ", then ".join("unknown" if seed is None else _format_seed(seed) for seed in run.seeds)
            return f"the seed of {run.name} is {listed}"
    seeds = [run.seed for run in recipe.runs]
    twice = next((seed for number, seed in enumerate(seeds) if seed in seeds[:number]), None)
    if twice is None:
        return None
    same = [run.name for run in recipe.runs if run.seed == twice]
    return f"{few(same)} have the same seed, {_format_seed(twice)}"


def _format_seed(seed: Seed) -> str:
    return str(seed[0]) if seed[1] is None else f"{seed[0]} with data seed {seed[1]}"
