# SPDX-License-Identifier: Apache-2.0
"""What the page says in words and tables: overview, norms, how it was measured, cost, and the samples of the probe."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mir_callback.analysis.page.charts import format_value
from mir_callback.analysis.page.views import PLANNED, RunView, find_fall, read_verdict
from mir_callback.analysis.samples import draw_images, write_out
from mir_callback.analysis.statistics import standard_error
from mir_callback.probe.probe import Probe
from mir_callback.probe.sample import Sample, measured_samples
from mir_callback.record import DEFINITION_FIELDS, DESCRIBED_FIELDS, EvalRecord, read_definition
from mir_callback.second_opinion import find_contradiction

_PLAIN = {  # fields that say how values were made, in words for everybody
    "num_samples": "samples",
    "num_vision_tokens": "vision tokens",
    "num_text_tokens": "text tokens",
    "dtype": "dtype of the hidden states",
    "root": "root",
    "prompt": "prompt",
    "first_sample": "first sample",
    "text_positions": "text positions",
    "text_only": "samples without an image",
    "vision_ids": "ids of vision tokens",
    "world_size": "ranks",
}
_NAMES = {
    "text_positions": "text positions",
    "text_only": "samples without an image",
    "vision_ids": "ids of vision tokens",
    "probe_fingerprint": "probe",
    "prompt": "prompt",
    "tokens_fingerprint": "tokens of the probe",
    "root": "root",
}
_DETAILS = (
    "probe_fingerprint",
    "tokens_fingerprint",
    "pixels_fingerprint",
    "batch_size",
    "passes",
    "storage_device",
    "weights_stamp",
)
_MUCH_LONGER = 2.0  # norm ratio, averaged over the layers
_LEAST_FALL = 0.05  # of MIR: what is less is not explained
_LEAST_PART = 0.5  # of a fall, that norms alone account for
_LEAST_SHRINKING = 0.95  # of a layer's norm ratio
_THUMBNAIL = (240, 180)  # twice as large as it is shown, for fine screens
_CHARACTERS = 220


def summarize(run: RunView) -> dict[str, Any]:
    """A run in the overview; its numbers are texts, with their standard error where it is known."""
    newest = run.records[-1] if run.records else None
    loss_step, loss = run.loss_points[-1] if run.loss_points else (None, None)
    shares = [r.eval_seconds / spent for r in run.records if r.step and r.eval_seconds and (spent := _spent(r))]
    seconds = [record.seconds for record in run.measured if record.seconds is not None]
    memory = [record.peak_memory_bytes for record in run.records if record.peak_memory_bytes is not None]
    found: dict[str, Any] = {
        "name": run.name,
        "verdict": read_verdict(newest) if newest else "",
        "reason": (newest.reason or newest.error or "") if newest else "",
        **dict.fromkeys(("best", "last"), format_value(None)),
        **dict.fromkeys(("best_step", "last_step", "planned", "start", "change", "norms", "contradiction")),
        "loss": format_value(loss),
        "loss_step": loss_step,
        "evaluations": f"{len(run.measured)}" + (f" and {len(run.failed)} failed" if run.failed else ""),
        "each": f"{format_value(statistics.median(seconds), 3)} s each" if seconds else "",
        "share": f"{shares[-1]:.1%} of the time" if shares else "",
        "memory": f"{max(memory) / 2**30:.2f} GiB beside training" if memory else "",
    }
    if run.moments:
        first, _, best, last = run.moments.values()
        planned = run.settings.get(PLANNED)
        found |= {"best": with_error(best), "best_step": best.step, "last": with_error(last), "last_step": last.step}
        lower = not first.is_after_start and float(first.mir or 0.0) < float(best.mir or 0.0)
        found["start"] = f"{first.mir:.3f}" if lower else None
        found["planned"] = planned if planned is not None and planned > last.step else None
        found["change"] = _describe_change(last, best)
        found["norms"] = explain_by_norms(run.measured)
        against = find_contradiction(run.measured)
        found["contradiction"] = None if against is None else against.message
    return found


def _spent(record: EvalRecord) -> float:
    return (record.eval_seconds or 0.0) + (record.train_seconds or 0.0)


def with_error(record: EvalRecord) -> str:
    """MIR and, where it is known, its standard error."""
    return f"{record.mir:.3f}" + (f" ± {record.mir_se:.3f}" if record.mir_se is not None else "")


def paired_error(record: EvalRecord, other: EvalRecord) -> float | None:
    """The standard error of the difference of two values of the same probe; None where it cannot be known."""
    here, there = record.influences or [], other.influences or []
    alike = record.probe_fingerprint == other.probe_fingerprint and record.num_samples == other.num_samples
    if not alike or len(here) != len(there) or len(here) < 2:
        return None
    return standard_error(np.array(here, dtype=float) - np.array(there, dtype=float))


def _describe_change(record: EvalRecord, other: EvalRecord) -> str | None:
    if record.step == other.step or record.mir is None or other.mir is None:
        return None
    error = paired_error(record, other)
    text = f"{record.mir - other.mir:+.3f}" + (f" ± {error:.3f}" if error is not None else "")
    return text.replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class NormFall:
    """A fall of MIR that shrinking vision norms alone would account for, to a large part."""

    start: int  # step of the peak
    end: int  # step of the lowest MIR after it
    fall: float  # of MIR between them
    by_norms: float  # of it, what norms alone would account for, at most ``fall``
    before: float  # norm ratio at the peak, geometric mean over the layers by their part of the distance
    after: float  # and at the end
    layers: str  # in which the norm ratio fell, such as "1 to 5, 8"


def explain_by_norms(measured: Sequence[EvalRecord]) -> NormFall | None:
    """Whether MIR fell after its peak because vision tokens became shorter, as far as norms can tell.

    A distance of vision tokens much longer than text grows with the square of their norm ratio r. Norms alone would
    therefore lower MIR by 2 log10(r_peak / r_end), averaged over the layers with their parts of the peak's distance.
    Returns None where that is less than half of the fall, the fall less than 0.05, the norms not known, or vision
    tokens less than twice as long as text tokens in the end, where the law does not hold.
    """
    peak, end = find_fall(measured)
    distances = np.array(peak.per_layer or [], dtype=float)
    ratios = [np.array((record.companions or {}).get("norm_ratio") or [], dtype=float) for record in (peak, end)]
    if not len(distances) == len(ratios[0]) == len(ratios[1]) > 0 or distances.sum() <= 0 or np.min(ratios) <= 0:
        return None
    fall = float(peak.mir or 0.0) - float(end.mir or 0.0)
    before, after = (float(np.log10(ratio) @ distances / distances.sum()) for ratio in ratios)
    by_norms = 2 * (before - after)
    if fall < _LEAST_FALL or by_norms < _LEAST_PART * fall or after < np.log10(_MUCH_LONGER):
        return None
    shorter = np.flatnonzero(ratios[1] < _LEAST_SHRINKING * ratios[0]) + 1
    pieces = np.split(shorter, np.flatnonzero(np.diff(shorter) > 1) + 1)
    layers = ", ".join(f"{p[0]}" if len(p) == 1 else f"{p[0]} to {p[-1]}" for p in pieces if len(p))
    return NormFall(peak.step, end.step, fall, min(by_norms, fall), 10**before, 10**after, layers)


def tabulate_definition(runs: Sequence[RunView]) -> tuple[list[Any], list[Any]]:
    """How values were made, in rows (name, text for each run, whether they differ): for everybody, and the details."""
    unknown = {
        name for run in runs for record in run.records for name, value in record.unknown.items() if _is_plain(value)
    }
    others = [name for name in sorted(unknown) if all(len(run.distinct(name)) <= 1 for run in runs)]
    rows = [
        [(label, [run.distinct(name) for run in runs]) for name, label in _PLAIN.items()],
        [
            (_NAMES.get(name, name.replace("_", " ")), [run.distinct(name) for run in runs])
            for name in (*_DETAILS, *others)
        ],
    ]
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        values = [[value] if (value := run.settings.get(name)) else [] for run in runs]
        rows[name != PLANNED].append((name, values))
    plain, details = (
        [
            (name, texts := [_join(values) for values in columns], len(set(texts)) > 1)
            for name, columns in part
            if any(columns)
        ]
        for part in rows
    )
    return plain, details


def _is_plain(value: Any) -> bool:
    return isinstance(value, (str, int, float, bool))


def find_incomparable(runs: Sequence[RunView]) -> list[str]:
    """Why values of these runs are not to be compared, in a few words each; empty if they are."""
    messages = []
    for name in DESCRIBED_FIELDS:
        found = {str(value) for run in runs for value in run.distinct(name)}
        unknown = [run.name for run in runs if not run.distinct(name)]
        if len(found) > 1:
            shown = ", ".join(sorted(found)) if not name.endswith("fingerprint") else f"{len(found)} different ones"
            messages.append(f"{_NAMES[name]}: {shown}")
        elif unknown and len(runs) > 1 and name in DEFINITION_FIELDS:
            messages.append(f"{_NAMES[name]}: not known of {', '.join(unknown[:4])}")
    return messages


def _join(values: Sequence[Any]) -> str:
    return ", then ".join(map(str, values[:4])) + (", ..." if len(values) > 4 else "") if values else format_value(None)


@dataclass(frozen=True)
class Card:
    """One sample of the probe."""

    index: int
    effect: float | None  # what it adds to MIR, about, in log10 units
    name: str
    text: str  # its beginning
    picture: str | None  # address of a JPEG that holds the images themselves; None if there are none


def make_cards(runs: Sequence[RunView], probe: Probe) -> tuple[list[Card], str]:
    """The samples of the probe, the largest effect first, and of which evaluation effects are: the newest with any."""
    newest = ((run, record) for run in runs for record in reversed(run.measured) if record.influences)
    own = (each for each in newest if each[1].probe_fingerprint == probe.fingerprint)
    run, record = next(own, (None, None))
    influences = (record.influences if record else None) or []
    places = measured_samples(probe.samples, read_definition(record, "text_only") == "count") if record else []
    # An influence is the derivative of MIR by a sample's weight; a sample has one part in their number of the weight.
    known = bool(places) and len(influences) == len(places)
    effects: list[float | None] = [None] * len(probe)
    for place, influence in zip(places, influences, strict=True) if known else ():
        effects[place] = influence / len(places)
    cards = [
        Card(index, effect, sample.name, _shorten(write_out(sample)), _encode(sample))
        for index, (sample, effect) in enumerate(zip(probe.samples, effects, strict=True))
    ]
    whose = f"{run.name} at step {record.step}" if run and record and known else ""
    return sorted(cards, key=lambda card: -abs(card.effect or 0.0)), whose


def _encode(sample: Sample) -> str | None:
    image, file = draw_images(sample, _THUMBNAIL), io.BytesIO()
    if image is None:
        return None
    image.save(file, "JPEG", quality=72)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _shorten(words: str) -> str:
    return words if len(words) <= _CHARACTERS else words[:_CHARACTERS].rstrip() + " ..."
