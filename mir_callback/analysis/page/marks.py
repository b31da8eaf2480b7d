# SPDX-License-Identifier: Apache-2.0
"""What stands out on a run's curve: its best value, stops, stages and failures; and the verdicts as a ribbon."""

from __future__ import annotations

from itertools import groupby

import numpy as np
from markupsafe import Markup

from mir_callback.analysis.page import charts, heat
from mir_callback.analysis.page.scales import Scale
from mir_callback.analysis.page.views import Axis, RunView
from mir_callback.training.history import STOPPING, Record

_OBSERVED = "would stop"  # of a rule that only observes, where it has found the plateau
VERDICTS = {
    "going on": "going-on",
    STOPPING: "plateau",
    _OBSERVED: "plateau",
    "rising": "rising",
    "too noisy": "too-noisy",
    "no data": "no-data",
    "failed": "failed",
}


def verdict_of(record: Record) -> str:
    """What the stop rule said; "failed" where the evaluation did; "" without a rule."""
    if record.get("mir") is None:
        return "failed"
    verdict = str(record.get("verdict") or "")
    return _OBSERVED if record.get("would_stop") and verdict != STOPPING else verdict


def marks(run: RunView, number: int, axis: Axis, x: Scale, y: Scale, alone: bool) -> tuple[list[Markup], list[Markup]]:
    """What stands out: the best value, where the rule would stop, and evaluations that failed."""
    css = f"run-{number}"
    best = run.moments["best"]
    place, height = float(x(axis.places(run, [best["step"]]))[0]), float(y([best["mir"]])[0])
    shapes = [charts.dots(np.array([place]), np.array([height]), f"best-outer {css}")]
    shapes.append(charts.dots(np.array([place]), np.array([height]), f"best-inner {css}"))
    words = [charts.note(place, height, f"lowest {best['mir']:.3f}", f"below {css}")] if alone else []
    for number_of_stop, (step, verdict) in enumerate(_plateaus(run)):
        place = float(x(axis.places(run, [step]))[0])
        shapes.append(charts.upright(place, f"stop {css}"))
        if alone and number_of_stop == 0:
            words.append(charts.note(place, 1.0, f"{verdict}, step {step}", "top"))
    for step in _stages(run):
        place = float(x(axis.places(run, [step]))[0])
        shapes.append(charts.upright(place, f"stage {css}"))
        if alone:
            words.append(charts.note(place, 0.93, f"other parameters train, step {step}", "top faint"))
    failed = x(axis.places(run, [record["step"] for record in run.failed]))
    words += [
        Markup(
            '<span class="cross-mark {}" style="left:{}%" title="step {}: {}">\N{MULTIPLICATION SIGN}</span>'
        ).format(css, f"{100 * place:.2f}", record["step"], record.get("error") or "failed")
        for place, record in zip(failed, run.failed, strict=True)
        if np.isfinite(place)
    ]
    return shapes, words


def ribbon(number: int, run: RunView, axis: Axis, x: Scale) -> Markup:
    """A ribbon of the rule's verdicts."""
    places = x(axis.places(run, [record["step"] for record in run.records]))
    records = [record for record, place in zip(run.records, places, strict=True) if np.isfinite(place)]
    edges = heat.edges_between(places[np.isfinite(places)])
    bars = []
    for verdict, group in groupby(range(len(records)), lambda index: verdict_of(records[index])):
        if verdict:
            span = list(group)
            first, last = records[span[0]], records[span[-1]]
            title = f"{verdict}, steps {first['step']} to {last['step']}: {last.get('reason') or ''}"
            bars.append(
                charts.bar(edges[span[0]], edges[span[-1] + 1], f"verdict {VERDICTS.get(verdict, 'other')}", title)
            )
    says = f"Verdicts of the stop rule on {run.name}; the last one: {verdict_of(run.records[-1]) or 'none'}"
    return charts.panel(None, bars, title="", says=says, size=f"ribbon run-{number}")


def _plateaus(run: RunView) -> list[tuple[int, str]]:
    """Where a plateau was found, the first of each row of such verdicts: its step, and what the rule said."""
    found = [(record["step"], verdict_of(record)) for record in run.measured]
    said = [verdict for _, verdict in found]
    return [
        (step, verdict)
        for (step, verdict), before in zip(found, ["", *said], strict=False)
        if verdict in (STOPPING, _OBSERVED) and verdict != before
    ]


def _stages(run: RunView) -> list[int]:
    """The steps at which other parameters were trained than at the evaluation before."""
    known = [record for record in run.measured if record.get("stage") is not None]
    return [
        record["step"] for record, before in zip(known[1:], known, strict=False) if record["stage"] != before["stage"]
    ]
