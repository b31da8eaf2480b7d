# SPDX-License-Identifier: Apache-2.0
"""One HTML page about runs: complete in itself, it loads nothing and may be mailed, printed and kept."""

from __future__ import annotations

import base64
import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mir_callback.analysis.compare import Comparison
from mir_callback.analysis.page import facts, timeline
from mir_callback.analysis.page.charts import format_value
from mir_callback.analysis.page.views import MOMENTS, VERDICTS, Quantity, RunView, number_colours, read_verdict
from mir_callback.analysis.tables import list_remarks, make_tables, state_verdict
from mir_callback.errors import HistoryError
from mir_callback.probe.probe import Probe

_PARTS = Path(__file__).parent
_NAMED = 4  # recipes that a title has room for
_TEMPLATES = Environment(
    loader=FileSystemLoader(_PARTS), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


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
        raise HistoryError("there is no run to report on")
    shown = [run for run in runs if run.moments]
    ordered = [*shown, *(run for run in runs if not run.moments)]  # a run has the same number wherever it is shown
    lines = timeline.draw_timelines(shown)
    curves = timeline.draw_profiles(shown)
    script = Markup((_PARTS / "page.js").read_text(encoding="utf-8"))
    own = [note if len(ordered) == 1 else f"{run.name}: {note}" for run in ordered for note in run.notes]
    return _TEMPLATES.get_template("page.html").render(
        # the same on every page
        version=metadata.version("mir-callback"),
        styles=Markup((_PARTS / "page.css").read_text(encoding="utf-8")),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        format_value=format_value,
        read_verdict=read_verdict,
        verdict_classes=VERDICTS,
        moments=MOMENTS,
        # of every run
        runs=ordered,
        title=_make_title(ordered),
        colours=number_colours(ordered),
        summaries=[facts.summarize(run) for run in ordered],
        costs=facts.list_costs(ordered),
        definition=facts.tabulate_definition(ordered),
        incomparable=facts.find_incomparable(ordered),
        notes=[*notes, *own],
        # of the runs that have values
        shown=shown,
        timelines=lines,
        profiles=curves,
        quantities=[curve.quantity for curve in curves],
        steps_at={moment: _name_steps(shown, moment) for moment in MOMENTS},
        cost_charts=timeline.draw_costs(shown),
        seen_verdicts=_list_verdicts(shown),
        sheet=facts.make_sheet(shown, probe),
        data=_collect_data(shown, lines, curves),
        # of the page
        comparison=None if comparison is None else _describe_comparison(comparison),
        written=written,
        reload_seconds=reload_seconds,
    )


def _describe_comparison(found: Comparison) -> dict[str, Any]:
    verdict = state_verdict(found) or f"Nothing is ranked by {found.by}."
    return {"verdict": verdict, "tables": make_tables(found), "remarks": list_remarks(found)}


def _make_title(runs: Sequence[RunView]) -> str:
    recipes = {run.recipe for run in runs}
    if None not in recipes and len(recipes) <= _NAMED:
        return ", ".join(dict.fromkeys(str(run.recipe) for run in runs))
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs"


def _name_steps(runs: Sequence[RunView], moment: str) -> str:
    steps = sorted({run.moments[moment].step for run in runs})
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}" if steps else ""


def _list_verdicts(runs: Sequence[RunView]) -> list[str]:
    seen = dict.fromkeys(read_verdict(record) for run in runs for record in run.records)
    return [verdict for verdict in seen if verdict]


def _collect_data(
    runs: Sequence[RunView], lines: Sequence[timeline.Timeline], curves: Sequence[timeline.Profile]
) -> Mapping[str, Any]:
    """What the page's script reads out under a pointer; the pictures themselves do without it."""
    return {
        "runs": [
            {
                "name": run.name,
                "steps": [record.step for record in run.measured],
                "mir": [facts.with_error(record) for record in run.measured],
                "loss": _losses_at(run),
                "verdict": [read_verdict(record) for record in run.measured],
                "reason": [record.reason or "" for record in run.measured],
                "layers": {curve.quantity.name: _layers_at(run, curve.quantity) for curve in curves},
            }
            for run in runs
        ],
        "moments": MOMENTS,
        "x": {line.axis.name: line.x for line in lines},
        "profiles": {
            curve.quantity.name: {"label": curve.quantity.label, "x": curve.x, "series": curve.series}
            for curve in curves
        },
    }


def _layers_at(run: RunView, quantity: Quantity) -> list[list[str]]:
    return [[format_value(value) for value in quantity.read(record)] for record in run.measured]


def _losses_at(run: RunView) -> list[str]:
    """For each evaluation the last loss logged up to its step."""
    steps = [step for step, _ in run.loss_points]
    passed = [bisect_right(steps, record.step) for record in run.measured]
    return [format_value(run.loss_points[count - 1][1] if count else None) for count in passed]
