# SPDX-License-Identifier: Apache-2.0
"""The probe on the page: small pictures, beginnings of the texts, and how much each sample moves the number."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import ImageOps

from mir_callback.analysis.page.charts import precise
from mir_callback.analysis.page.timeline import verdict_of
from mir_callback.analysis.page.views import MOMENTS, PLANNED, RunView
from mir_callback.history import DEFINITION_FIELDS, Record
from mir_callback.metric.influence import compute_standard_error as standard_error
from mir_callback.probe.probe import Probe, Sample

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
# What a record holds besides: shown elsewhere on the page, or different at each evaluation.
_MEASURED = {
    *("step", "epoch", "mir", "mir_se", "per_layer", "per_layer_se", "influences", "companions", "seconds"),
    *("vision_outliers", "text_outliers", "verdict", "reason", "elapsed", "time", "train_seconds", "eval_seconds"),
    *("loss", "loss_step", "eval_cost", "step_seconds", "error", "tokens_seen", "samples_seen", "peak_memory_bytes"),
    *("would_stop", "expected_gain", "expected_gain_se", "stage", "probe_loss", "mir_extrapolated"),
}


@dataclass(frozen=True)
class Summary:
    """A run in a line of the overview.

    Attributes:
        run: whose.
        best: its lowest MIR, with its standard error.
        best_step: where.
        start: MIR of the untrained weights, where it is lower than that; else "".
        last: its last MIR, with its standard error.
        last_step: where.
        planned: steps the run was planned for, where it has not taken them all; else None.
        change: last minus best with its standard error, or "".
        verdict: the stop rule's last one.
        reason: why.
    """

    run: RunView
    best: str
    best_step: int | None
    start: str
    last: str
    last_step: int | None
    planned: int | None
    change: str
    verdict: str
    reason: str


def summary_of(run: RunView) -> Summary:
    """The overview of a run."""
    newest = run.records[-1] if run.records else {}
    verdict, reason = (
        (verdict_of(newest), str(newest.get("reason") or newest.get("error") or "")) if newest else ("", "")
    )
    if not run.moments:
        dash = precise(None)
        return Summary(run, dash, None, "", dash, None, None, "", verdict, reason)
    first, best, last = (run.moments[moment] for moment in MOMENTS)
    planned = run.settings.get(PLANNED)
    return Summary(
        run,
        with_error(best),
        best["step"],
        f"{first['mir']:.3f}" if first["step"] == 0 and first["mir"] < best["mir"] else "",
        with_error(last),
        last["step"],
        planned if planned is not None and planned > last["step"] else None,
        _difference(last, best),
        verdict,
        reason,
    )


def with_error(record: Record) -> str:
    """MIR and, where it is known, its standard error."""
    error = record.get("mir_se")
    return f"{record['mir']:.3f}" + (f" ± {error:.3f}" if error is not None else "")


def paired_error(record: Record, other: Record) -> float | None:
    """The standard error of the difference of two values of the same probe; None where it cannot be known."""
    here, there = record.get("influences"), other.get("influences")
    same = all(record.get(field) == other.get(field) for field in ("probe_fingerprint", "num_samples"))
    if not here or not there or not same or len(here) != len(there) or len(here) < 2:
        return None
    return standard_error(torch.tensor(here, dtype=torch.float64) - torch.tensor(there, dtype=torch.float64)).item()


def _difference(record: Record, other: Record) -> str:
    if record["step"] == other["step"]:
        return ""
    error = paired_error(record, other)
    text = f"{record['mir'] - other['mir']:+.3f}" + (f" ± {error:.3f}" if error is not None else "")
    return text.replace("-", "\N{MINUS SIGN}")


def costs_of(runs: Sequence[RunView]) -> list[dict[str, str]]:
    """What the evaluations of each run cost, by what the page calls it; without what is known of no run."""
    costs = [_costs(run) for run in runs]
    known = [name for name in costs[0] if any(cost[name] != precise(None) for cost in costs)]
    return [{name: cost[name] for name in known} for cost in costs]


def _costs(run: RunView) -> dict[str, str]:
    seconds = [record["seconds"] for record in run.measured if record.get("seconds") is not None]
    shares = [share for record in run.records if (share := time_share(record)) is not None]
    memory = [record["peak_memory_bytes"] for record in run.records if record.get("peak_memory_bytes") is not None]
    spent = [record["eval_seconds"] for record in run.records if record.get("eval_seconds") is not None]
    in_all = spent[-1] if spent else (sum(seconds) if seconds else None)
    return {
        "evaluations": f"{len(run.measured)}" + (f" and {len(run.failed)} failed" if run.failed else ""),
        "each, median": duration(statistics.median(seconds) if seconds else None),
        "longest": duration(max(seconds, default=None)),
        "in all": duration(in_all),
        "of the time": f"{shares[-1]:.1%}" if shares else precise(None),
        "peak memory, besides training": size(max(memory)) if memory else precise(None),
    }


def time_share(record: Record) -> float | None:
    """The part of the time so far that went into evaluations; None before the first step."""
    spent, trained = record.get("eval_seconds"), record.get("train_seconds")
    if spent is None or trained is None or record["step"] == 0 or spent + trained <= 0:
        return None
    return float(spent / (spent + trained))


def definition_table(runs: Sequence[RunView]) -> list[tuple[str, list[str], bool]]:
    """How the values were made: (name, its text for each run, whether the runs differ), settings last."""
    others = {
        name
        for run in runs
        for record in run.records
        for name, value in record.items()
        if name not in _MEASURED and name not in _DEFINITION and isinstance(value, (str, int, float, bool))
    }
    constant = {name for name in others if all(len(run.common(name)) <= 1 for run in runs)}
    rows = [(label, [_joined(run.common(name)) for run in runs]) for name, label in _DEFINITION.items()]
    rows += [(name.replace("_", " "), [_joined(run.common(name)) for run in runs]) for name in sorted(constant)]
    settings = dict.fromkeys(name for run in runs for name in run.settings)
    rows += [
        (name, [_joined([run.settings[name]] if name in run.settings else []) for run in runs]) for name in settings
    ]
    return [
        (label, texts, len(set(texts)) > 1) for label, texts in rows if any(text != precise(None) for text in texts)
    ]


def incomparable(runs: Sequence[RunView]) -> list[str]:
    """Why values of these runs are not to be compared, in sentences; empty if they are."""
    told = []
    for field in DEFINITION_FIELDS:
        found = {str(value) for run in runs for value in run.common(field) or [_UNKNOWN]}
        if len(found) > 1 or (len(runs) > 1 and found == {_UNKNOWN}):
            told.append(f"{_DEFINITION[field]}: {', '.join(sorted(found))}")
    return told


def duration(seconds: float | None) -> str:
    """Seconds in the unit that suits them."""
    if seconds is None:
        return precise(None)
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{precise(seconds, 3)} s"


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:.0f} bytes"


def _joined(values: Sequence[Any]) -> str:
    return ", then ".join(map(str, values[:4])) + (", ..." if len(values) > 4 else "") if values else precise(None)


_THUMBNAIL = (240, 180)  # twice as large as it is shown, for fine screens
_QUALITY = 72
_CHARACTERS = 220


@dataclass(frozen=True)
class Card:
    """One sample.

    Attributes:
        index: in the probe.
        name: where it came from.
        text: its beginning.
        picture: address of a JPEG that holds the picture itself; "" without the probe.
        effect: what the sample adds to MIR at ``Sheet.record``, about, in log10 units; or None.
    """

    index: int
    name: str
    text: str
    picture: str
    effect: float | None


@dataclass(frozen=True)
class Sheet:
    """The samples of a probe.

    Attributes:
        heading: which probe.
        cards: in the probe's order.
        run: name of the run the influences are of.
        record: the evaluation the influences are of, or None.
    """

    heading: str
    cards: list[Card]
    run: str
    record: Record | None


def sheet_of(runs: Sequence[RunView], probe: Probe | None) -> Sheet | None:
    """The samples of the probe and, at the last evaluation that has them, their influences; None if neither is known.

    Influences of another probe than the given one are left out.
    """
    known = [
        (run, record)
        for run in runs
        for record in reversed(run.measured)
        if record.get("influences")
        and (
            probe is None
            or (record.get("probe_fingerprint"), len(record["influences"])) == (probe.fingerprint, len(probe))
        )
    ]
    run, record = known[0] if known else (None, None)
    count = len(record["influences"]) if record else 0
    # An influence is the derivative of MIR by a sample's weight; a sample has one part in `count` of the weight.
    effects: list[float | None] = [influence / count for influence in record["influences"]] if record else []
    if probe is not None:
        effects = effects or [None] * len(probe)
        cards = [
            Card(index, sample.name, _beginning(sample.text), _picture(sample), effect)
            for index, (sample, effect) in enumerate(zip(probe.samples, effects, strict=True))
        ]
        heading = f"probe {probe.fingerprint}: {len(probe)} samples, texts cut to {probe.max_text_tokens} tokens"
    elif record:
        cards = [Card(index, "", "", "", effect) for index, effect in enumerate(effects)]
        heading = f"probe {record.get('probe_fingerprint') or 'unknown'}: {len(cards)} samples"
    else:
        return None
    return Sheet(heading, cards, run.name if run else "", record)


def _picture(sample: Sample) -> str:
    file = io.BytesIO()
    ImageOps.contain(sample.open_image(), _THUMBNAIL).save(file, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _beginning(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _CHARACTERS else words[:_CHARACTERS].rstrip() + " ..."
