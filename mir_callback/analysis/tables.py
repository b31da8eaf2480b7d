# SPDX-License-Identifier: Apache-2.0
"""A comparison as tables of text, the same ones for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mir_callback.analysis.axes import Axis
from mir_callback.analysis.compare import AxisResult, Comparison
from mir_callback.analysis.runs import Run
from mir_callback.analysis.savings import Stop
from mir_callback.training.history import lowest_record

NOT_ALIKE = "NOT ALIKE, compared anyway"
_MAX_PAIRS = 28  # of 8 recipes


@dataclass(frozen=True)
class TextTable:
    """A table of words.

    Attributes:
        title: what it shows.
        columns: their headings; the first one's cells are names, the others are figures.
        rows: cells.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def place_words(axis: Axis, place: float) -> str:
    """A place of an axis, such as "step 120" or "3.2 min". Ranks: pure."""
    match axis:
        case "step":
            return f"step {place:.10g}"
        case "time":
            return duration(place)
        case _:
            return f"{place:,.0f} {axis}"


def duration(seconds: float) -> str:
    """Seconds as people say them. Ranks: pure."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if abs(seconds) >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def tables_of(found: Comparison) -> list[TextTable]:
    """The ranking, the differences behind it, and what each run would have saved. Ranks: pure."""
    marked = f"{NOT_ALIKE}: " if found.mismatch else ""
    tables = []
    if found.ranking is not None:
        tables.append(_ranking(found, found.ranking, marked))
        tables.append(_differences(found, found.ranking, marked))
    tables.append(_runs(found))
    return tables


def verdict_of(found: Comparison) -> str | None:
    """The outcome in a sentence; None if nothing is ranked. Ranks: pure."""
    result = found.ranking
    if result is None or result.place is None:
        return None
    names = [found.recipes[index].name for index in result.members]
    where = place_words(result.axis, result.place)
    mark = f"{NOT_ALIKE}. " if found.mismatch else ""
    if not any(pair.differs for pair in result.pairs):
        return f"{mark}No difference beyond noise at {where}: {', '.join(names)}."
    lowest = min(range(len(names)), key=result.mean)
    best = names[lowest]
    alike = [{pair.one, pair.other} for pair in result.pairs if not pair.differs]
    tied = [name for index, name in enumerate(names) if {index, lowest} in alike]
    more = f"; not told apart from it by the noise: {', '.join(tied)}" if tied else ""
    return f"{mark}Lowest MIR at {where}: {best}{more}."


def _ranking(found: Comparison, result: AxisResult, marked: str) -> TextTable:
    others = [
        axis
        for axis in found.axes
        if axis.axis != result.axis and axis.place is not None and len(axis.members) > 1 and axis.doubt is None
    ]
    headings = [f"at {place_words(axis.axis, axis.place)}" for axis in others if axis.place is not None]
    assert result.place is not None
    assert result.noise is not None
    rows = []
    order = sorted(range(len(result.members)), key=lambda member: (result.ranks[member], result.mean(member)))
    for member in order:
        index = result.members[member]
        cells = [found.recipes[index].name, _rank(result.ranks, member), str(len(found.recipes[index].runs))]
        cells += [f"{result.mean(member):.4f}", f"{result.noise.sds[member]:.2g}"]
        cells += [_elsewhere(axis, index) for axis in others]
        rows.append(tuple(cells))
    title = f"{marked}MIR at {place_words(result.axis, result.place)} (lower is better; = shares its rank)"
    return TextTable(title, ("recipe", "rank", "runs", "MIR", "sd of a run", *headings), tuple(rows))


def _elsewhere(axis: AxisResult, index: int) -> str:
    if index not in axis.members:
        return "-"
    member = axis.members.index(index)
    return f"{axis.mean(member):.4f} (rank {_rank(axis.ranks, member)})"


def _rank(ranks: Sequence[int], member: int) -> str:
    return f"{ranks[member]}{'=' if ranks.count(ranks[member]) > 1 else ''}"


def _differences(found: Comparison, result: AxisResult, marked: str) -> TextTable:
    names = [found.recipes[index].name for index in result.members]
    rows = []
    for pair in result.pairs[:_MAX_PAIRS]:
        lower = names[pair.one if pair.value < 0 else pair.other]
        rows.append(
            (
                f"{names[pair.one]} - {names[pair.other]}",
                f"{pair.value:+.4f}",
                f"{pair.se:.4f}",
                "?" if pair.probe.kind == "unknown" else f"{pair.probe.se:.4f} {pair.probe.kind}",
                f"{pair.runs_se:.4f}",
                f"{pair.p_adjusted:.3f}",
                f"{pair.bearable_sd:.2g}",
                f"{lower} is lower" if pair.differs else "no difference",
            )
        )
    title = f"{marked}Differences (beyond noise where p < {found.level:g}, adjusted for {len(result.pairs)} of them)"
    if len(result.pairs) > _MAX_PAIRS:
        title += f", the first {_MAX_PAIRS}"
    columns = ("difference", "MIR", "standard error", "of the probe", "of the runs", "p", "bears sd", "so")
    return TextTable(title, columns, tuple(rows))


def _runs(found: Comparison) -> TextTable:
    rows = []
    for recipe, stops in zip(found.recipes, found.stops, strict=True):
        for run, stop in zip(recipe.runs, stops, strict=True):
            rows.append((recipe.label(run), *_measured(run), *_saved(stop)))
    title = f"Runs, and where {found.rule} would have stopped them"
    columns = ("run", "evaluations", "last MIR", "lowest MIR after step 0", "stop", "saves", "gives away")
    return TextTable(title, columns, tuple(rows))


def _measured(run: Run) -> tuple[str, ...]:
    failed = len(run.records) - len(run.measured)
    last, best = run.measured[-1], lowest_record(run.records)
    se = f" ± {last['mir_se']:.4f}" if last.get("mir_se") is not None else ""
    return (
        f"{len(run.records)}" + (f" ({failed} failed)" if failed else ""),
        f"{last['mir']:.4f}{se} (step {last['step']})",
        "-" if best is None else f"{best['mir']:.4f} (step {best['step']})",
    )


def _saved(stop: Stop) -> tuple[str, ...]:
    if stop.step is None:
        return f"none ({stop.reason.partition(':')[0]})", "-", "-"
    saves = f"{stop.saved_steps} steps, {stop.saved_share:.0%}"
    if stop.saved_seconds is not None:
        saves += f", {duration(stop.saved_seconds)}"
    return f"step {stop.step}", saves, "-" if stop.given_away is None else f"{stop.given_away:+.4f}"
