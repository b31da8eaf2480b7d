# SPDX-License-Identifier: Apache-2.0
"""A comparison as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mir_callback.analysis.compare import AxisResult, Comparison, Stop
from mir_callback.analysis.curves import AXES, Axis
from mir_callback.analysis.load import Run
from mir_callback.history import lowest_record

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


def as_json(found: Comparison) -> str:
    """Everything a comparison found, but the records themselves. Ranks: pure."""
    recipes = []
    for recipe, stops in zip(found.recipes, found.stops, strict=True):
        runs = [
            {
                "name": run.name,
                "path": str(run.path),
                "source": str(run.source),
                "evaluations": len(run.records),
                "last": _brief(run.measured[-1]),
                "lowest": _brief(lowest_record(run.records)),
                "stop": asdict(stop),
            }
            for run, stop in zip(recipe.runs, stops, strict=True)
        ]
        recipes.append({"name": recipe.name, "runs": runs})
    content = {
        "verdict": verdict_of(found),
        "ranked_by": found.by if found.ranking is not None else None,
        "mismatch": found.mismatch,
        "level": found.level,
        "rule": found.rule,
        "recipes": recipes,
        "axes": {result.axis: _axis(found, result) for result in found.axes},
        "remarks": list(found.remarks),
    }
    return json.dumps(_plain(content), indent=2, allow_nan=False) + "\n"


def as_csv(found: Comparison) -> str:
    """A line for each run. Ranks: pure."""
    lines = io.StringIO()
    fields = ["recipe", "run", "rank", "alike", "evaluations", "last_step", "last_mir", "last_mir_se"]
    fields += ["lowest_step", "lowest_mir"]
    fields += [name for axis in AXES for name in (f"equal_{axis}", f"mir_at_equal_{axis}")]
    fields += ["stop_step", "saved_steps", "saved_share", "saved_seconds", "given_away"]
    writer = csv.DictWriter(lines, fields, lineterminator="\n")
    writer.writeheader()
    for index, recipe in enumerate(found.recipes):
        for number, run in enumerate(recipe.runs):
            last, lowest, stop = run.measured[-1], lowest_record(run.records) or {}, found.stops[index][number]
            row: dict[str, Any] = {"recipe": recipe.name, "run": run.name, "alike": "no" if found.mismatch else "yes"}
            row |= {"rank": _rank_export(found, index), "evaluations": len(run.records), "last_step": last["step"]}
            row |= {"last_mir": last["mir"], "last_mir_se": last.get("mir_se")}
            row |= {"lowest_step": lowest.get("step"), "lowest_mir": lowest.get("mir")}
            for result in found.axes:
                if result.place is not None and index in result.members:
                    point = result.points[result.members.index(index)][number]
                    row |= {f"equal_{result.axis}": result.place, f"mir_at_equal_{result.axis}": point.mir}
            row |= {"stop_step": stop.step, "saved_steps": stop.saved_steps, "saved_share": stop.saved_share}
            row |= {"saved_seconds": stop.saved_seconds, "given_away": stop.given_away}
            writer.writerow(row)
    return lines.getvalue()


def as_markdown(found: Comparison) -> str:
    """The tables of the terminal, and what there is to know. Ranks: pure."""
    parts = [f"**{_escaped(verdict)}**"] if (verdict := verdict_of(found)) else []
    parts += [_markdown_table(table) for table in tables_of(found)]
    remarks = remarks_of(found)
    if remarks:
        parts.append("\n".join(f"- {_escaped(remark)}" for remark in remarks))
    return "\n\n".join(parts) + "\n"


def remarks_of(found: Comparison) -> list[str]:
    """What is to be known about a comparison, in sentences. Ranks: pure."""
    told = [] if found.mismatch is None else [f"the values are not alike: {found.mismatch}"]
    for result in found.axes:
        if result.axis == found.by or result.place is None:
            told += [f"by {result.axis}: {sentence}" for sentence in result.told]
        if result.doubt is not None:
            told.append(f"by {result.axis}: {result.doubt}; such places are in the tables with --by {result.axis} only")
    return told + list(found.remarks)


def _rank_export(found: Comparison, index: int) -> int | None:
    result = found.ranking
    return None if result is None or index not in result.members else result.ranks[result.members.index(index)]


def _axis(found: Comparison, result: AxisResult) -> dict[str, Any]:
    names = [found.recipes[index].name for index in result.members]
    standings = [
        {
            "recipe": name,
            "mir": result.mean(member) if result.points else None,
            "rank": result.ranks[member] if result.pairs else None,
            "values": [{"mir": p.mir, "mir_se": p.se, "measured": p.measured, "step": p.step} for p in found_points],
        }
        for member, (name, found_points) in enumerate(zip(names, result.points or ((),) * len(names), strict=True))
    ]
    pairs = [{**asdict(pair), "one": names[pair.one], "other": names[pair.other]} for pair in result.pairs]
    noise = None if result.noise is None or not result.pairs else asdict(result.noise)
    place = {"clock": result.clock, "place": result.place, "doubt": result.doubt}
    return {**place, "recipes": standings, "differences": pairs, "run_noise": noise, "told": list(result.told)}


def _brief(record: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if record is None else {name: record.get(name) for name in ("step", "mir", "mir_se")}


def _plain(value: Any) -> Any:
    """Infinite degrees of freedom are null in JSON."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _markdown_table(table: TextTable) -> str:
    lines = [f"### {_escaped(table.title)}", "", _line(table.columns)]
    lines.append("|" + "|".join(["---", *["---:"] * (len(table.columns) - 1)]) + "|")
    return "\n".join([*lines, *(_line(row) for row in table.rows)])


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def _escaped(text: str) -> str:
    """Names come from folders: nothing in them may become a cell, a heading or a tag."""
    text = "".join(sign if sign.isprintable() or sign.isspace() else "\N{REPLACEMENT CHARACTER}" for sign in text)
    for sign in ("\\", "|", "*", "_", "`", "<", "["):
        text = text.replace(sign, "\\" + sign)
    return " ".join(text.split())
