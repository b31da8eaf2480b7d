# SPDX-License-Identifier: Apache-2.0
"""A comparison as JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import asdict
from typing import Any

from mir_callback.analysis.axes import AXES
from mir_callback.analysis.compare import AxisResult, Comparison
from mir_callback.analysis.tables import TextTable, tables_of, verdict_of
from mir_callback.training.history import lowest_record


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
            row |= {"rank": _rank(found, index), "evaluations": len(run.records), "last_step": last["step"]}
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


def _rank(found: Comparison, index: int) -> int | None:
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
