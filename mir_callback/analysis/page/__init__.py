# SPDX-License-Identifier: Apache-2.0
"""One HTML page about runs: complete in itself, it loads nothing and may be mailed, printed and kept."""

from __future__ import annotations

import base64
import hashlib
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import colormaps

from mir_callback.analysis.compare import Comparison
from mir_callback.analysis.page import facts, timeline
from mir_callback.analysis.page.charts import format_value
from mir_callback.analysis.page.views import MOMENTS, MOST_DRAWN, VERDICTS, RunView, list_quantities, read_verdict
from mir_callback.analysis.tables import list_remarks, make_tables, state_verdict
from mir_callback.errors import HistoryError
from mir_callback.probe.probe import Probe

_PARTS = Path(__file__).parent
_NAMED = 4  # recipes that a title has room for
_FAILURES = 20  # that are listed
_DRAWN = (100, 1280)  # evaluations: of a run at least, of all runs together
_PALETTE = [[round(255 * part) for part in colormaps["viridis"](at)[:3]] for at in np.linspace(0, 1, 17)]
# What a terminal obeys, and what turns the direction of text around: names of folders can contain it.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
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
        HTML. What comes from outside is escaped in it, control characters too; its policy lets a browser run the
        page's own script only.

    Raises:
        HistoryError: no runs.

    Ranks: pure.
    """
    if not runs:
        raise HistoryError("there is no run to report on")
    shown = [run for run in runs if run.moments]
    ordered = [*shown, *(run for run in runs if not run.moments)]  # a run has the same number wherever it is shown
    least, together = _DRAWN
    drawn = [run.thin(max(least, min(MOST_DRAWN, together // len(shown)))) for run in shown]
    axes = timeline.scale_axes(drawn) if drawn else []
    owners = [number if run.recipe is None else run.recipe for number, run in enumerate(ordered)]
    own = [(f"{run.name}: " if len(ordered) > 1 else "", run) for run in ordered]
    cards, effects_of = facts.make_cards(shown, probe) if probe else ([], "")
    script = Markup((_PARTS / "page.js").read_text(encoding="utf-8"))
    text = _TEMPLATES.get_template("page.html").render(
        version=metadata.version("mir-callback"),
        styles=Markup((_PARTS / "page.css").read_text(encoding="utf-8")),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        format_value=format_value,
        verdicts=VERDICTS,
        moments=MOMENTS,
        title=_make_title(ordered),
        written=written,
        reload_seconds=reload_seconds,
        runs=ordered,
        shown=shown,
        counts=[sum(len(run.measured) for run in part) for part in (drawn, shown)],
        colours=[list(dict.fromkeys(owners)).index(owner) for owner in owners],
        summaries=[facts.summarize(run) for run in ordered],
        comparison=None if comparison is None else _describe_comparison(comparison),
        incomparable=facts.find_incomparable(ordered),
        notes=[*notes, *(f"{name}{note}" for name, run in own for note in run.notes)],
        failures=[f"{name}step {r.step}: {r.error or 'failed'}" for name, run in own for r in run.failed[:_FAILURES]],
        definition=facts.tabulate_definition(ordered),
        axes=[axis for axis, _ in axes],
        panels=timeline.draw_timeline(drawn, axes[0][1]) if drawn else {},
        profiles=list(timeline.draw_profiles(drawn)),
        steps_at={moment: _name_steps(shown, moment) for moment in MOMENTS},
        seen_verdicts=list(dict.fromkeys(read_verdict(record) for run in shown for record in run.records)),
        cards=cards,
        effects_of=effects_of,
        data={
            "runs": [_read_out(run, kept) for run, kept in zip(shown, drawn, strict=True)],
            "moments": MOMENTS,
            "axes": [
                {
                    "label": axis.label,
                    "ticks": x.ticks(7),
                    "x": [x(axis.read(run.measured)).round(5).tolist() for run in drawn],
                }
                for axis, x in axes
            ],
            "quantities": {each.name: timeline.encode_layers(each, drawn) for each in list_quantities(drawn) if drawn},
            "palette": _PALETTE,
        },
    )
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


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


def _read_out(run: RunView, drawn: RunView) -> Mapping[str, Any]:
    """What a pointer reads of a run at each of the evaluations that are drawn, with the loss logged last before it."""
    steps = [step for step, _ in run.loss_points]
    passed = [bisect_right(steps, record.step) for record in drawn.measured]
    return {
        "name": run.name,
        "steps": [record.step for record in drawn.measured],
        "mir": [facts.with_error(record) for record in drawn.measured],
        "loss": [format_value(run.loss_points[count - 1][1] if count else None) for count in passed],
        "verdict": [read_verdict(record) for record in drawn.measured],
        "reason": [record.reason or "" for record in drawn.measured],
        "at": {moment: drawn.measured.index(record) for moment, record in drawn.moments.items()},
        "last_loss": format_value(run.loss_points[-1][1] if run.loss_points else None),
    }
