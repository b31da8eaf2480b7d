# SPDX-License-Identifier: Apache-2.0
"""Whether values of MIR were made in the same way, so that they can be compared."""

from __future__ import annotations

from collections.abc import Sequence

from mir_callback.analysis.runs import Run
from mir_callback.training.history import CIRCUMSTANCES, DEFINITION_FIELDS, Record

_MEANING = {
    "probe_fingerprint": "probe",
    "tokens_fingerprint": "token ids of the probe",
    "root": "root",
}


def comparable_records(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """The records that were made as the newest one with a value; what is left out is told.

    Failed evaluations stay, they have no value.

    Args:
        records: of one run, at least one with a value.

    Ranks: pure.
    """
    newest = next(record for record in reversed(records) if record["mir"] is not None)
    kept = [record for record in records if record["mir"] is None or _definition(record) == _definition(newest)]
    if len(kept) == len(records):
        return kept, []
    return kept, [
        f"{len(records) - len(kept)} of its {len(records)} evaluations are left out, they were made with another "
        "probe, token ids or root than the newest one"
    ]


def mismatch(runs: Sequence[Run]) -> str | None:
    """Why the values of runs are not alike, as a sentence; None if they are. Each run has one definition.

    Ranks: pure.
    """
    for field in DEFINITION_FIELDS:
        unknown = [run.name for run in runs if _of(run, field) is None]
        if unknown and len(runs) > 1:
            return f"{field} must be known of every run to compare them, got none for {_few(unknown)}"
    for field in DEFINITION_FIELDS:
        values: dict[object, list[str]] = {}
        for run in runs:
            values.setdefault(_of(run, field), []).append(run.name)
        if len(values) > 1:
            told = "; ".join(f"{value} in {_few(names)}" for value, names in values.items())
            return f"{field} ({_MEANING[field]}) must be the same in all runs, got {told}"
    return None


def other_circumstances(runs: Sequence[Run]) -> list[str]:
    """What was otherwise in some runs without making their values another number, in sentences. Ranks: pure."""
    told = []
    for field, meaning in CIRCUMSTANCES.items():
        values: dict[str, list[str]] = {}
        for run in runs:
            found = list(dict.fromkeys(str(r[field]) for r in run.measured if r.get(field) is not None))
            if found:
                values.setdefault(", then ".join(found), []).append(run.name)
        if len(values) > 1 or any(", then " in value for value in values):
            listed = "; ".join(f"{value} in {_few(names)}" for value, names in values.items())
            told.append(f"{meaning}: {listed}; a small part of a difference may come from that")
    return told


def _definition(record: Record) -> tuple[object, ...]:
    return tuple(record.get(field) for field in DEFINITION_FIELDS)


def _of(run: Run, field: str) -> object:
    return next((record[field] for record in run.measured if record.get(field) is not None), None)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
