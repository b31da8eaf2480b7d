# SPDX-License-Identifier: Apache-2.0
"""What the page says in words and tables: overview, cost, how it was measured, and the samples of the probe."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ImageOps

from mir_callback.analysis.page.charts import format_value
from mir_callback.analysis.page.views import MOMENTS, PLANNED, RunView, read_verdict, time_share
from mir_callback.analysis.statistics import standard_error
from mir_callback.probe.probe import Probe, Sample
from mir_callback.record import DEFINITION_FIELDS, EvalRecord

_UNKNOWN = "unknown"
_DEFINITION = {
    "probe_fingerprint": "probe",
    "tokens_fingerprint": "tokens of the probe",
    "pixels_fingerprint": "pixel inputs",
    "root": "root",
    "dtype": "dtype of the hidden states",
    "num_samples": "samples",
    "num_vision_tokens": "vision tokens",
    "num_text_tokens": "text tokens",
    "world_size": "ranks",
}
# Shown under their own name where they do not change over a run, as are fields of other versions.
_FURTHER = {
    *("batch_size", "checkpoint", "disabled", "load_seconds", "max_steps", "passes", "run", "storage_device"),
    "weights_stamp",
}
_THUMBNAIL = (240, 180)  # twice as large as it is shown, for fine screens
_QUALITY = 72
_CHARACTERS = 220


@dataclass(frozen=True)
class Summary:
    """A run in a line of the overview; its numbers are texts, with their standard error where it is known."""

    run: RunView
    verdict: str  # the stop rule's last one
    reason: str
    best: str = format_value(None)  # lowest MIR
    best_step: int | None = None
    start: str = ""  # MIR of the untrained weights, where it is lower than that
    last: str = format_value(None)
    last_step: int | None = None
    planned: float | None = None  # steps, where the run has not taken them all
    change: str = ""  # last minus best


def summarize(run: RunView) -> Summary:
    """The overview of a run."""
    newest = run.records[-1] if run.records else None
    verdict, reason = (read_verdict(newest), newest.reason or newest.error or "") if newest else ("", "")
    if not run.moments:
        return Summary(run, verdict, reason)
    first, best, last = (run.moments[moment] for moment in MOMENTS)
    start = f"{first.mir:.3f}" if first.step == 0 and _mir(first) < _mir(best) else ""
    planned = run.settings.get(PLANNED)
    ahead = planned if planned is not None and planned > last.step else None
    change = _describe_change(last, best)
    return Summary(run, verdict, reason, with_error(best), best.step, start, with_error(last), last.step, ahead, change)


def with_error(record: EvalRecord) -> str:
    """MIR and, where it is known, its standard error."""
    return f"{record.mir:.3f}" + (f" ± {record.mir_se:.3f}" if record.mir_se is not None else "")


def paired_error(record: EvalRecord, other: EvalRecord) -> float | None:
    """The standard error of the difference of two values of the same probe; None where it cannot be known."""
    here, there = record.influences or [], other.influences or []
    probes = [(each.probe_fingerprint, each.num_samples) for each in (record, other)]
    if probes[0] != probes[1] or len(here) != len(there) or len(here) < 2:
        return None
    return standard_error(np.array(here, dtype=float) - np.array(there, dtype=float))


def _describe_change(record: EvalRecord, other: EvalRecord) -> str:
    if record.step == other.step:
        return ""
    error = paired_error(record, other)
    text = f"{_mir(record) - _mir(other):+.3f}" + (f" ± {error:.3f}" if error is not None else "")
    return text.replace("-", "\N{MINUS SIGN}")


def _mir(record: EvalRecord) -> float:
    assert record.mir is not None
    return record.mir


def list_costs(runs: Sequence[RunView]) -> list[dict[str, str]]:
    """What the evaluations of each run cost, by what the page calls it; without what is known of no run."""
    costs = [_list_costs(run) for run in runs]
    known = [name for name in costs[0] if any(cost[name] != format_value(None) for cost in costs)]
    return [{name: cost[name] for name in known} for cost in costs]


def _list_costs(run: RunView) -> dict[str, str]:
    seconds = [record.seconds for record in run.measured if record.seconds is not None]
    shares = [share for record in run.records if (share := time_share(record)) is not None]
    memory = [record.peak_memory_bytes for record in run.records if record.peak_memory_bytes is not None]
    spent = [record.eval_seconds for record in run.records if record.eval_seconds is not None]
    in_all = spent[-1:] or ([sum(seconds)] if seconds else [])
    unknown = format_value(None)
    return {
        "evaluations": f"{len(run.measured)}" + (f" and {len(run.failed)} failed" if run.failed else ""),
        "each, median": _format_seconds(statistics.median(seconds)) if seconds else unknown,
        "longest": _format_seconds(max(seconds)) if seconds else unknown,
        "in all": _format_seconds(in_all[0]) if in_all else unknown,
        "of the time": f"{shares[-1]:.1%}" if shares else unknown,
        "peak memory, besides training": _format_bytes(max(memory)) if memory else unknown,
    }


def tabulate_definition(runs: Sequence[RunView]) -> list[tuple[str, list[str], bool]]:
    """How the values were made: (name, its text for each run, whether the runs differ), settings last."""
    unknown = [pair for run in runs for record in run.records for pair in record.unknown.items()]
    others = {name for name, value in unknown if isinstance(value, (str, int, float, bool))}
    further = [name for name in others | _FURTHER if all(len(run.distinct(name)) <= 1 for run in runs)]
    rows = [(label, [run.distinct(name) for run in runs]) for name, label in _DEFINITION.items()]
    rows += [(name.replace("_", " "), [run.distinct(name) for run in runs]) for name in sorted(further)]
    settings = dict.fromkeys(name for run in runs for name in run.settings)
    rows += [(name, [[value] if (value := run.settings.get(name)) else [] for run in runs]) for name in settings]
    texts = [(label, [_join(values) for values in columns]) for label, columns in rows if any(columns)]
    return [(label, cells, len(set(cells)) > 1) for label, cells in texts]


def find_incomparable(runs: Sequence[RunView]) -> list[str]:
    """Why values of these runs are not to be compared, in sentences; empty if they are."""
    messages = []
    for field in DEFINITION_FIELDS:
        found = {str(value) for run in runs for value in run.distinct(field) or [_UNKNOWN]}
        if len(found) > 1 or (len(runs) > 1 and found == {_UNKNOWN}):
            messages.append(f"{_DEFINITION[field]}: {', '.join(sorted(found))}")
    return messages


def _join(values: Sequence[Any]) -> str:
    return ", then ".join(map(str, values[:4])) + (", ..." if len(values) > 4 else "") if values else format_value(None)


def _format_seconds(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{format_value(seconds, 3)} s"


def _format_bytes(count: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} bytes"


@dataclass(frozen=True)
class Card:
    """One sample of the probe."""

    index: int
    effect: float | None  # what it adds to MIR at ``Sheet.record``, about, in log10 units
    name: str = ""
    text: str = ""  # its beginning
    picture: str = ""  # address of a JPEG that holds the picture itself


@dataclass(frozen=True)
class Sheet:
    """The samples of a probe, in its order."""

    heading: str
    cards: list[Card]
    run: str  # whose influences they show
    record: EvalRecord | None  # at which evaluation


def make_sheet(runs: Sequence[RunView], probe: Probe | None) -> Sheet | None:
    """The samples of the probe and, at the last evaluation that has them, their influences; None if neither is known.

    Influences of another probe than the given one are left out.
    """
    known = [(run, record, record.influences) for run in runs for record in reversed(run.measured) if record.influences]
    if probe is not None:
        own = (probe.fingerprint, len(probe))
        known = [(run, record, found) for run, record, found in known if (record.probe_fingerprint, len(found)) == own]
    run, record, influences = known[0] if known else (None, None, [])
    # An influence is the derivative of MIR by a sample's weight; a sample has one part in their number of the weight.
    effects: list[float | None] = [influence / len(influences) for influence in influences]
    if probe is not None:
        heading = f"probe {probe.fingerprint}: {len(probe)} samples, texts cut to {probe.max_text_tokens} tokens"
        cards = [
            Card(index, effect, sample.name, _shorten(sample.text), _encode_picture(sample))
            for index, (sample, effect) in enumerate(zip(probe.samples, effects or [None] * len(probe), strict=True))
        ]
    elif record:
        heading = f"probe {record.probe_fingerprint or _UNKNOWN}: {len(effects)} samples"
        cards = [Card(index, effect) for index, effect in enumerate(effects)]
    else:
        return None
    return Sheet(heading, cards, run.name if run else "", record)


def _encode_picture(sample: Sample) -> str:
    file = io.BytesIO()
    ImageOps.contain(sample.open_image(), _THUMBNAIL).save(file, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _shorten(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _CHARACTERS else words[:_CHARACTERS].rstrip() + " ..."
