# SPDX-License-Identifier: Apache-2.0
"""A comparison as text tables with verdict and remarks, and as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from mir_callback.analysis.compare import AxisResult, Comparison, Stop
from mir_callback.analysis.curves import AXES, Axis
from mir_callback.analysis.load import Run
from mir_callback.analysis.statistics import Difference, Noise
from mir_callback.early_stopping import PlateauRule
from mir_callback.fs import printable
from mir_callback.record import EvalRecord, lowest_record

NOT_COMPARABLE = "NOT COMPARABLE, compared anyway"
_BRIEF = ("step", "mir", "mir_se", "scale_free_mir", "vision_gain", "vision_gain_se")
_MAX_PAIRS = 28  # of 8 recipes


@dataclass(frozen=True)
class TextTable:
    """A table of text; the first column has names, the others have figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def make_tables(found: Comparison) -> list[TextTable]:
    """The ranking, the differences it follows from, and where each run could have stopped."""
    mark, result = f"{NOT_COMPARABLE}: " if found.mismatch else "", found.ranking
    ranked = [_make_ranking(found, result, mark), _make_differences(found, result, mark)] if result else []
    return [*ranked, _make_runs(found)]


def state_verdict(found: Comparison) -> str | None:
    """The result in a sentence; None if nothing is ranked."""
    result = found.ranking
    if result is None or result.x is None:
        return None
    names = _names(found, result)
    where = _format_position(result.axis, result.x)
    mark = f"{NOT_COMPARABLE}. " if found.mismatch else ""
    tested = [member for member, rank in enumerate(result.ranks) if rank is not None]
    left = [name for name, rank in zip(names, result.ranks, strict=True) if rank is None]
    if not tested:
        return f"{mark}Undecided at {where}: {', '.join(left)}. Only replicates with other seeds can decide."
    more = f" Not tested, with one run only: {', '.join(left)}." if left else ""
    if not any(pair.differs for pair in result.pairs):
        return f"{mark}No difference beyond noise at {where}: {', '.join(names[member] for member in tested)}.{more}"
    lowest = _in_order(result)[0]
    alike = [{pair.one, pair.other} for pair in result.pairs if not pair.differs]
    tied = [names[member] for member in tested if {member, lowest} in alike]
    tie = f"; no difference beyond noise to {', '.join(tied)}" if tied else ""
    return f"{mark}Lowest MIR at {where}: {names[lowest]}{tie}.{more}"


def list_remarks(found: Comparison) -> list[str]:
    """Notes on a comparison: noise, what was skipped, what may mislead."""
    remarks = [] if found.mismatch is None else [f"the values are not comparable: {found.mismatch}"]
    for result in found.axes:
        if result.axis == found.by or result.x is None:
            remarks += [f"by {result.axis}: {message}" for message in result.messages]
        if result.doubt is not None:
            remarks.append(f"by {result.axis}: {result.doubt}; shown in the tables only with --by {result.axis}")
    return remarks + list(found.remarks)


def _make_ranking(found: Comparison, result: AxisResult, mark: str) -> TextTable:
    assert result.x is not None
    others = [
        (other, _format_position(other.axis, other.x))
        for other in found.axes
        if other is not result and other.x is not None and len(other.members) > 1 and other.doubt is None
    ]
    titles, opinions = _second_opinions(result)
    rows = []
    for member in _in_order(result):
        index = result.members[member]
        recipe = found.recipes[index]
        cells = [recipe.name, _format_rank(result.ranks, member), str(len(recipe.runs))]
        cells += [f"{result.mean(member):.4f}", _format(result.seed_stds[member], ".2g"), *opinions[member]]
        for other, _ in others:
            there = other.members.index(index) if index in other.members else None
            cells.append("-" if there is None else f"{other.mean(there):.4f} (rank {_format_rank(other.ranks, there)})")
        rows.append(tuple(cells))
    title = f"{mark}MIR at {_format_position(result.axis, result.x)} (lower is better; = tie, - not tested)"
    columns = ("recipe", "rank", "runs", "MIR", "SD of seeds", *titles, *(f"at {x}" for _, x in others))
    return TextTable(title, columns, tuple(rows))


def _second_opinions(result: AxisResult) -> tuple[list[str], list[list[str]]]:
    """Titles and, for each member, means over its runs of the companions that any member has there."""
    titles, columns = [], []
    for title, name in (("scale-free MIR", "scale_free_mir"), ("vision gain", "vision_gain")):
        values = [[getattr(point, name) for point in points] for points in result.points]
        column = ["-" if None in each else f"{math.fsum(each) / len(each):.4f}" for each in values]
        if any(cell != "-" for cell in column):
            titles.append(title)
            columns.append(column)
    return titles, [list(cells) for cells in zip(*columns, strict=True)] if columns else [[] for _ in result.members]


def _make_differences(found: Comparison, result: AxisResult, mark: str) -> TextTable:
    names = _names(found, result)
    rows = tuple(
        (
            f"{names[pair.one]} - {names[pair.other]}",
            f"{pair.value:+.4f}",
            _format(pair.se, ".4f"),
            _format_noise(pair.probe),
            _format_noise(pair.seeds),
            _format(pair.p_adjusted, ".3f"),
            _format(pair.max_seed_std, ".2g"),
            _judgement(pair, names),
        )
        for pair in result.pairs[:_MAX_PAIRS]
    )
    count = sum(pair.p is not None for pair in result.pairs)
    adjusted = f"; p is adjusted for {count} comparisons" if count > 1 else ""
    title = f"{mark}Differences (beyond noise if p < {found.level:g}{adjusted})"
    if len(result.pairs) > _MAX_PAIRS:
        title += f", the first {_MAX_PAIRS}"
    columns = ("difference", "MIR", "SE", "SE of probe", "SE of seeds", "p", "bears SD", "verdict")
    return TextTable(title, columns, rows)


def _make_runs(found: Comparison) -> TextTable:
    labelled = [(found.recipes[index].label(run), run, stop) for index, _, run, stop in _each_run(found)]
    rows = tuple((label, *_describe(run), *_describe_stop(stop)) for label, run, stop in labelled)
    title = f"Runs, and where {_format_rule(found.rule)} would have stopped them"
    columns = ("run", "evaluations", "last MIR", "lowest MIR after step 0", "would stop", "saves", "missed gain")
    return TextTable(title, columns, rows)


def _describe(run: Run) -> tuple[str, ...]:
    failed = len(run.records) - len(run.measured)
    last, lowest = run.measured[-1], lowest_record(run.records)
    se = f" ± {last.mir_se:.4f}" if last.mir_se is not None else ""
    return (
        f"{len(run.records)}" + (f" ({failed} failed)" if failed else ""),
        f"{last.mir:.4f}{se} (step {last.step})",
        "-" if lowest is None else f"{lowest.mir:.4f} (step {lowest.step})",
    )


def _describe_stop(stop: Stop) -> tuple[str, ...]:
    if stop.step is None:
        return f"no ({stop.reason.partition(':')[0]})", "-", "-"
    saves = f"{stop.saved_steps} steps, {stop.saved_share:.0%}"
    if stop.saved_seconds is not None:
        saves += f", {_format_seconds(stop.saved_seconds)}"
    return f"at step {stop.step}", saves, "-" if stop.missed_gain is None else f"{stop.missed_gain:+.4f}"


def _each_run(found: Comparison) -> Iterator[tuple[int, int, Run, Stop]]:
    """All runs and their stops, with the index of the recipe and that of the run in it."""
    for index, (recipe, stops) in enumerate(zip(found.recipes, found.stops, strict=True)):
        for number, (run, stop) in enumerate(zip(recipe.runs, stops, strict=True)):
            yield index, number, run, stop


def _names(found: Comparison, result: AxisResult) -> list[str]:
    return [found.recipes[index].name for index in result.members]


def _in_order(result: AxisResult) -> list[int]:
    """The members by rank and mean, those without a rank last."""
    members = range(len(result.members))
    return sorted(members, key=lambda member: (result.ranks[member] or math.inf, result.mean(member)))


def _format_rank(ranks: Sequence[int | None], member: int) -> str:
    if ranks[member] is None:
        return "-"
    return f"{ranks[member]}{'=' if ranks.count(ranks[member]) > 1 else ''}"


def _format(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def _format_noise(noise: Noise) -> str:
    return "?" if noise.kind == "unknown" else f"{noise.se:.4f} {noise.kind}"


def _judgement(pair: Difference, names: Sequence[str]) -> str:
    if pair.p is None:
        return "not tested"
    return f"{names[pair.one if pair.value < 0 else pair.other]} is lower" if pair.differs else "no difference"


def _format_rule(rule: PlateauRule) -> str:
    """The rule with the options that differ from the defaults."""
    changed = [each.name for each in fields(rule) if getattr(rule, each.name) != each.default]
    return f"PlateauRule({', '.join(f'{name}={getattr(rule, name)!r}' for name in changed)})"


def _format_position(axis: Axis, x: float) -> str:
    if axis == "step":
        return f"step {x:.10g}"
    return _format_seconds(x) if axis == "time" else f"{x:,.0f} {axis}"


def _format_seconds(seconds: float) -> str:
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if abs(seconds) >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def to_json(found: Comparison) -> str:
    """The whole comparison, without the records."""
    recipes: list[dict[str, Any]] = [{"name": recipe.name, "runs": []} for recipe in found.recipes]
    for index, _, run, stop in _each_run(found):
        entry = {"name": run.name, "path": str(run.path), "source": str(run.source), "evaluations": len(run.records)}
        entry |= {"last": _brief(run.measured[-1]), "lowest": _brief(lowest_record(run.records)), "stop": asdict(stop)}
        entry["seeds"] = run.seeds
        recipes[index]["runs"].append(entry)
    content = {
        "verdict": state_verdict(found),
        "ranked_by": found.by if found.ranking is not None else None,
        "mismatch": found.mismatch,
        "level": found.level,
        "rule": repr(found.rule),
        "recipes": recipes,
        "axes": {result.axis: _axis(found, result) for result in found.axes},
        "remarks": list(found.remarks),
    }
    return json.dumps(_plain(content), indent=2, allow_nan=False) + "\n"


def _axis(found: Comparison, result: AxisResult) -> dict[str, Any]:
    names = _names(found, result)
    standings = [
        {
            "recipe": name,
            "mir": result.mean(member) if points else None,
            "rank": result.ranks[member] if result.pairs else None,
            "seed_std": result.seed_stds[member] if points else None,
            "values": [{"mir": p.mir, "mir_se": p.se, "measured": p.measured, "step": p.step} for p in points],
        }
        for member, (name, points) in enumerate(zip(names, result.points or ((),) * len(names), strict=True))
    ]
    return {
        "clock": result.clock,
        "x": result.x,
        "doubt": result.doubt,
        "recipes": standings,
        "differences": [{**asdict(pair), "one": names[pair.one], "other": names[pair.other]} for pair in result.pairs],
        "messages": list(result.messages),
    }


def _brief(record: EvalRecord | None) -> dict[str, Any] | None:
    return None if record is None else {name: record[name] for name in _BRIEF}


def _plain(value: Any) -> Any:
    """A JSON value with None for infinite numbers (degrees of freedom)."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_csv(found: Comparison) -> str:
    """One line per run."""
    columns = ["recipe", "run", "rank", "comparable", "evaluations", "last_step", "last_mir", "last_mir_se"]
    columns += ["lowest_step", "lowest_mir"]
    columns += [name for axis in AXES for name in (f"equal_{axis}", f"mir_at_equal_{axis}")]
    saved = ["saved_steps", "saved_share", "saved_seconds", "missed_gain"]
    columns += ["stop_step", *saved]
    lines = io.StringIO()
    writer = csv.DictWriter(lines, columns, lineterminator="\n")
    writer.writeheader()
    for index, number, run, stop in _each_run(found):
        last, lowest = run.measured[-1], lowest_record(run.records)
        row: dict[str, Any] = {"recipe": found.recipes[index].name, "run": run.name, "stop_step": stop.step}
        row |= {"comparable": "no" if found.mismatch else "yes", "evaluations": len(run.records)}
        row |= {"last_step": last.step, "last_mir": last.mir, "last_mir_se": last.mir_se}
        row |= {name: getattr(stop, name) for name in saved}
        if lowest is not None:
            row |= {"lowest_step": lowest.step, "lowest_mir": lowest.mir}
        for result in found.axes:
            if result.x is not None and index in result.members:
                member = result.members.index(index)
                point = result.points[member][number]
                row |= {f"equal_{result.axis}": result.x, f"mir_at_equal_{result.axis}": point.mir}
                if result is found.ranking:
                    row["rank"] = result.ranks[member]
        writer.writerow(row)
    return lines.getvalue()


def to_markdown(found: Comparison) -> str:
    """The verdict, tables and remarks, as on the terminal."""
    parts = [f"**{_escape(verdict)}**"] if (verdict := state_verdict(found)) else []
    for table in make_tables(found):
        rule = "|" + "|".join(["---", *["---:"] * (len(table.columns) - 1)]) + "|"
        rows = [f"| {' | '.join(map(_escape, row))} |" for row in (table.columns, *table.rows)]
        parts.append("\n".join([f"### {_escape(table.title)}", "", rows[0], rule, *rows[1:]]))
    if remarks := list_remarks(found):
        parts.append("\n".join(f"- {_escape(remark)}" for remark in remarks))
    return "\n\n".join(parts) + "\n"


def _escape(text: str) -> str:
    """Text without Markdown, HTML or control characters: names of folders can contain anything."""
    text = printable(" ".join(text.split()))
    for sign in ("\\", "|", "*", "_", "`", "<", "["):
        text = text.replace(sign, "\\" + sign)
    return text
