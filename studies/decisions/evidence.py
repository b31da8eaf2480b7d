# SPDX-License-Identifier: Apache-2.0
"""Write docs/evidence.md and its picture from the raw values in benchmarks/results/decisions.json.

.venv/bin/python -m studies.decisions.evidence
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from . import analysis
from .analysis import METRICS, Run, Table

ROOT = Path(__file__).resolve().parents[2]
RAW = ROOT / "benchmarks" / "results" / "decisions.json"
PAGE, PICTURE = ROOT / "docs" / "evidence.md", ROOT / "docs" / "evidence.png"

Chosen = Callable[[Table, int, int], bool]


def _same_captions(table: Table, one: int, other: int) -> bool:
    return table.captions[one] == table.captions[other]


def _both_of(*kinds: str) -> Chosen:
    return lambda table, one, other: {table.kinds[one], table.kinds[other]} <= {*kinds, "base"}


# Columns of the table of decisions. Sabotaged recipes are in the first only.
PAIRS: dict[str, Chosen] = {
    "all": lambda table, one, other: True,
    "honest": lambda table, one, other: "sabotage" not in (table.kinds[one], table.kinds[other]),
    "same captions": _same_captions,
    "learning rate": _both_of("learning rate"),
    "length": _both_of("length"),
    "data": _both_of("data"),
    "architecture": _both_of("architecture"),
}


def page(runs: Sequence[Run]) -> str:
    """The whole of docs/evidence.md."""
    table = analysis.tabulate(runs)
    parts = TEXT.format(
        decisions=_decisions(table),
    )
    return parts


def _pairs(table: Table, column: str) -> list[tuple[int, int]]:
    return analysis.decided_pairs(table, lambda one, other: PAIRS[column](table, one, other))


def _decisions(table: Table) -> str:
    found = {column: _pairs(table, column) for column in PAIRS}
    rows = [
        [
            "metric",
            *(f"{column} ({len(pairs)})" for column, pairs in found.items()),
            "interval, honest",
            "single runs",
            "Spearman",
        ]
    ]
    honest = found["honest"]
    order = sorted(METRICS, key=lambda name: -analysis.share_right(table.values[name], honest))
    for name in order:
        values = table.values[name]
        low, high = analysis.interval(values, honest, len(table.recipes))
        rows.append(
            [
                METRICS[name].title,
                *(f"{analysis.share_right(values, pairs):.0%}" for pairs in found.values()),
                f"{low:.0%} to {high:.0%}",
                f"{analysis.share_right(values, honest, seeds=True):.0%}",
                f"{analysis.spearman(table, name):.2f}",
            ]
        )
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


TEXT = """{decisions}
"""
