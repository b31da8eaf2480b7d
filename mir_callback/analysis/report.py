# SPDX-License-Identifier: Apache-2.0
"""One HTML page about runs: complete in itself, it loads nothing and may be mailed, printed and kept."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mir_callback.analysis.compare import Comparison
from mir_callback.analysis.page import facts, profiles, timeline
from mir_callback.analysis.page import facts as samples
from mir_callback.analysis.page import profiles as costs
from mir_callback.analysis.page import timeline as marks
from mir_callback.analysis.page.charts import precise
from mir_callback.analysis.page.views import MOMENTS, RunView, colours_of
from mir_callback.analysis.tables import remarks_of, tables_of, verdict_of
from mir_callback.errors import HistoryError
from mir_callback.probe.probe import Probe

_PARTS = Path(__file__).parent / "page"
_NAMED = 4  # recipes that a title has room for


def render_report(
    runs: Sequence[RunView],
    *,
    comparison: Comparison | None = None,
    probe: Probe | None = None,
    notes: Sequence[str] = (),
    written: datetime,
    reload_seconds: float | None = None,
) -> str:
    """Make the page.

    Args:
        runs: at least one; runs without a value yet are named on the page.
        comparison: of the runs, to stand at the top; None leaves it out.
        probe: to show its samples; None leaves them out.
        notes: sentences about what could not be shown.
        written: the time that stands on the page.
        reload_seconds: the page loads itself again after this time, for a file that is written again and again.

    Returns:
        HTML. What comes from outside is escaped in it; its policy lets a browser run the page's own script only.

    Raises:
        HistoryError: no runs.

    Ranks: pure.
    """
    if not runs:
        raise HistoryError("runs must hold at least one run to report on, got none")
    shown = [run for run in runs if run.moments]
    ordered = [*shown, *(run for run in runs if not run.moments)]  # a run has the same number wherever it is shown
    return (
        _environment()
        .get_template("page.html")
        .render(
            **_of_all(ordered),
            **_of_shown(shown),
            **_own_parts(),
            comparison=None if comparison is None else _compared(comparison),
            sheet=samples.sheet_of(shown, probe),
            notes=[*notes, *_notes(ordered)],
            written=written,
            reload_seconds=reload_seconds,
        )
    )


def _compared(found: Comparison) -> dict[str, Any]:
    verdict = verdict_of(found) or f"Nothing is ranked by {found.by}."
    return {"verdict": verdict, "tables": tables_of(found), "remarks": remarks_of(found)}


def _own_parts() -> dict[str, Any]:
    """What is the same on every page."""
    script = Markup((_PARTS / "page.js").read_text(encoding="utf-8"))
    return {
        "styles": Markup((_PARTS / "page.css").read_text(encoding="utf-8")),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "version": metadata.version("mir-callback"),
        "precise": precise,
        "verdict_of": marks.verdict_of,
        "verdict_classes": marks.VERDICTS,
        "moments": MOMENTS,
    }


def _of_all(runs: Sequence[RunView]) -> dict[str, Any]:
    """What the page says of every run."""
    return {
        "runs": runs,
        "title": _title(runs),
        "colours": colours_of(runs),
        "summaries": [facts.summary_of(run) for run in runs],
        "costs": facts.costs_of(runs),
        "definition": facts.definition_table(runs),
        "incomparable": facts.incomparable(runs),
    }


def _title(runs: Sequence[RunView]) -> str:
    recipes = {run.recipe for run in runs}
    if None not in recipes and len(recipes) <= _NAMED:
        return ", ".join(dict.fromkeys(str(run.recipe) for run in runs))
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs"


def _of_shown(runs: Sequence[RunView]) -> dict[str, Any]:
    """What the page draws of the runs that have values."""
    lines = timeline.timelines(runs) if runs else []
    curves = profiles.profiles(runs)
    return {
        "shown": runs,
        "timelines": lines,
        "quantities": [curve.quantity for curve in curves],
        "profiles": curves,
        "steps_at": {moment: _steps_at(runs, moment) for moment in MOMENTS},
        "cost_charts": costs.cost_charts(runs),
        "seen_verdicts": _seen_verdicts(runs),
        "data": _data(runs, lines, curves),
    }


def _steps_at(runs: Sequence[RunView], moment: str) -> str:
    steps = sorted({run.moments[moment]["step"] for run in runs})
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}" if steps else ""


def _seen_verdicts(runs: Sequence[RunView]) -> list[str]:
    seen = dict.fromkeys(marks.verdict_of(record) for run in runs for record in run.records)
    return [verdict for verdict in seen if verdict]


def _notes(runs: Sequence[RunView]) -> list[str]:
    return [note if len(runs) == 1 else f"{run.name}: {note}" for run in runs for note in run.notes]


def _data(
    runs: Sequence[RunView], lines: Sequence[timeline.Timeline], curves: Sequence[profiles.Profile]
) -> Mapping[str, Any]:
    """What the page's script reads out under a pointer; the pictures themselves do without it."""
    return {
        "runs": [
            {
                "name": run.name,
                "steps": [record["step"] for record in run.measured],
                "mir": [facts.with_error(record) for record in run.measured],
                "loss": _losses_at(run),
                "verdict": [marks.verdict_of(record) for record in run.measured],
                "reason": [str(record.get("reason") or "") for record in run.measured],
                "layers": {
                    curve.quantity.name: [
                        [precise(value) for value in curve.quantity.of(record) or []] for record in run.measured
                    ]
                    for curve in curves
                },
            }
            for run in runs
        ],
        "moments": MOMENTS,
        "places": {line.axis.name: line.places for line in lines},
        "profiles": {
            curve.quantity.name: {"label": curve.quantity.label, "places": curve.places, "series": curve.series}
            for curve in curves
        },
    }


def _losses_at(run: RunView) -> list[str]:
    """For each evaluation the last loss logged up to its step."""
    found, position, points = [], 0, run.loss_points
    for record in run.measured:
        while position < len(points) and points[position][0] <= record["step"]:
            position += 1
        found.append(precise(points[position - 1][1] if position else None))
    return found


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_PARTS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
