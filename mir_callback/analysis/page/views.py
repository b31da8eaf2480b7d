# SPDX-License-Identifier: Apache-2.0
"""A run as the page sees it, what it can show of each evaluation and layer, and the axes it can be drawn over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from mir_callback.analysis.compare import Recipe
from mir_callback.analysis.load import Run, noted_losses
from mir_callback.analysis.page.charts import Kind
from mir_callback.record import FIELDS, STOPPING, EvalRecord, lowest_record, read_definition

PLANNED = "planned steps"  # among the settings of a run
WOULD_STOP = "would stop"  # of a rule that only observes, where it has found the plateau
MOST_DRAWN = 400  # evaluations of a run
# Evaluations, and what the page calls them.
MOMENTS = {"first": "first", "peak": "peak", "best": "lowest", "last": "last"}
# What the rule says: its class name and what it means.
VERDICTS = {
    "no data": ("no-data", "too few evaluations yet"),
    "going on": ("going-on", "MIR may still fall, so training goes on"),
    "rising": ("rising", "MIR rises, which never stops a run"),
    "too noisy": ("too-noisy", "the noise hides where MIR is going"),
    STOPPING: ("plateau", "going on would bring too little, training stops"),
    WOULD_STOP: ("plateau", "going on would bring too little, but the rule only observes"),
    "failed": ("failed", "the evaluation has no value"),
}


@dataclass(frozen=True)
class Quantity:
    """A number of each layer."""

    name: str  # in the records
    label: str
    kind: Kind = "log"  # of its scale
    meaning: str = ""

    def read(self, record: EvalRecord) -> list[float]:
        """The values of a record, one for each layer; empty if it has none."""
        found = record.per_layer if self.name == "per_layer" else (record.companions or {}).get(self.name)
        return found or []


DISTANCE = Quantity(
    "per_layer", "distance FD", meaning="MIR is log10 of the sum; the last layer is behind the final norm."
)
_COMPANIONS = (
    Quantity("mean_part", "FD: part of the means", meaning="Squared distance between the two mean vectors."),
    Quantity("covariance_part", "FD: part of the spreads", meaning="What differing covariances add to the distance."),
    Quantity("norm_ratio", "norm ratio", meaning="Mean norm of vision tokens over that of text tokens; 1 is equal."),
    Quantity("cosine", "cosine of the means", "linear", "1: both lie in the same direction from the origin."),
    Quantity("vision_rank", "effective rank, vision", meaning="How many directions the vision tokens really use."),
    Quantity("text_rank", "effective rank, text", meaning="How many directions the text tokens really use."),
    Quantity(
        "scale_free", "scale-free FD", meaning="The distance with vision tokens scaled to the norm of text tokens."
    ),
)


@dataclass(frozen=True)
class RunView:
    """One run, ready to be shown."""

    name: str
    records: Sequence[EvalRecord]  # by step, failed ones too
    losses: Sequence[tuple[int, float]] = ()  # (step, logged training loss), by step
    settings: Mapping[str, Any] = field(default_factory=dict)  # further facts about the run; None: not known
    notes: Sequence[str] = ()  # what was missing or damaged, in sentences
    recipe: str | None = None  # runs of one recipe differ only in their seed and share a colour

    @classmethod
    def from_run(cls, run: Run, recipe: Recipe) -> RunView:
        """A run from disk, under its name among those of other recipes."""
        label, settings = recipe.label(run), {PLANNED: run.max_steps, "read from": str(run.source)}
        return cls(
            label, run.planned, run.losses, settings, run.problems, None if label == recipe.name else recipe.name
        )

    @cached_property
    def measured(self) -> list[EvalRecord]:
        """The evaluations that have a value."""
        return [record for record in self.records if record.mir is not None]

    @cached_property
    def failed(self) -> list[EvalRecord]:
        """The evaluations that have none."""
        return [record for record in self.records if record.mir is None]

    @cached_property
    def moments(self) -> dict[str, EvalRecord]:
        """First, highest, best (as `mir_best` has it) and last evaluation; empty if there is none."""
        if not self.measured:
            return {}
        best = lowest_record(self.measured) or self.measured[0]
        peak = max(self.measured, key=lambda record: record.mir or 0.0)
        return {"first": self.measured[0], "peak": peak, "best": best, "last": self.measured[-1]}

    @cached_property
    def loss_points(self) -> list[tuple[int, float]]:
        """Logged losses, or those that the evaluations noted if the log is not at hand."""
        return list(self.losses or noted_losses(self.records))

    def distinct(self, name: str) -> list[Any]:
        """The different values of a field over the run, of another version's too, in order of appearance."""
        found = (
            read_definition(record, name) if name in FIELDS else record.unknown.get(name) for record in self.records
        )
        return list({repr(value): value for value in found if value is not None}.values())

    def thin(self, most: int) -> RunView:
        """The run with about ``most`` evaluations and losses at most, whose curves look the same."""
        found = list_drawn(self.records)
        kept = [found[i] for i in _thin([record.mir for record in found], most, [found.index(self.moments["best"])])]
        failed = self.failed[:: max(1, len(self.failed) // most)]
        losses = [self.loss_points[i] for i in _thin([loss for _, loss in self.loss_points], most)]
        return replace(self, records=sorted([*kept, *failed], key=lambda record: record.step), losses=losses)


def list_drawn(records: Sequence[EvalRecord]) -> list[EvalRecord]:
    """Of a run's evaluations those that a page may draw: up to about MOST_DRAWN; it shows values of layers of no other.

    All are chosen by step and MIR, so it may be asked before the values of layers are read.
    """
    measured = [record for record in records if record.mir is not None]
    if not measured:
        return []
    fall = (measured.index(record) for record in find_fall(measured))
    best = lowest_record(measured) or measured[0]
    chosen = _thin([record.mir for record in measured], MOST_DRAWN, [measured.index(best), *fall])
    return [measured[number] for number in chosen]


def find_fall(measured: Sequence[EvalRecord]) -> tuple[EvalRecord, EvalRecord]:
    """The evaluation with the highest MIR, and the one with the lowest from there on."""
    peak = max(range(len(measured)), key=lambda number: measured[number].mir or 0.0)
    return measured[peak], min(measured[peak:], key=lambda record: record.mir or 0.0)


def _thin(values: Sequence[float | None], most: int, keep: Iterable[int] = ()) -> list[int]:
    """Where the curve of many values has its ends, and the lowest and highest value of each of its stretches."""
    if len(values) <= most:
        return list(range(len(values)))
    stretches, array = np.array_split(np.arange(len(values)), most // 2), np.array(values, dtype=float)
    extremes = (int(part[find(array[part])]) for part in stretches for find in (np.argmin, np.argmax))
    return sorted({0, len(values) - 1, *keep, *extremes})


def read_verdict(record: EvalRecord) -> str:
    """What the stop rule said; "failed" where the evaluation did; "" without a rule."""
    if record.mir is None:
        return "failed"
    return WOULD_STOP if record.would_stop and record.verdict != STOPPING else record.verdict or ""


def list_quantities(runs: Sequence[RunView]) -> list[Quantity]:
    """The distance, and the companions that an evaluation has, those of other versions last under their own name."""
    records = [record for run in runs for record in run.measured]
    present = {name for record in records for name, values in (record.companions or {}).items() if values}
    known = [quantity for quantity in _COMPANIONS if quantity.name in present]
    others = sorted(present - {quantity.name for quantity in known})
    return [DISTANCE, *known, *(Quantity(name, name.replace("_", " "), "linear") for name in others)]


def stack_layers(quantity: Quantity, records: Sequence[EvalRecord]) -> np.ndarray:
    """The values of evaluations side by side, (layers, evaluations) float64; NaN where there is none."""
    columns = [quantity.read(record) for record in records]
    table = np.full((max(map(len, columns), default=0), len(records)), np.nan)
    for number, column in enumerate(columns):
        table[: len(column), number] = column
    return table


@dataclass(frozen=True)
class Axis:
    """Something that runs on while a model trains."""

    name: str  # for the page's switch and its address
    label: str  # with the unit
    field: str = "step"  # of a record
    unit: float = 1.0  # values are divided by it
    least: float = 0.0  # lower ones lie there, as zero on a logarithmic axis

    def read(self, records: Sequence[EvalRecord]) -> np.ndarray:
        """Where evaluations lie on it, (n,) float64."""
        return np.array([max(record[self.field] / self.unit, self.least) for record in records], dtype=float)


def find_axes(runs: Sequence[RunView]) -> list[Axis]:
    """The axes that all evaluations of all runs have a position on; steps first."""
    # Training alone, carried over restarts; else what has passed since the process began, evaluations included.
    own = all(_runs_on(run, "train_seconds") for run in runs)
    clock, words = ("train_seconds", "training time") if own else ("elapsed", "time since the start")
    longest = max((record[clock] or 0.0 for run in runs for record in run.measured), default=0.0)
    units = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
    unit, name = next((unit, name) for unit, name in units if longest >= 3 * unit or unit == 1.0)
    others = [
        Axis("time", f"{words}, {name}", clock, unit),
        Axis("samples", "training samples seen", "samples_seen"),
        Axis("tokens", "training tokens seen", "tokens_seen"),
        Axis("epoch", "epoch", "epoch"),
    ]
    steps = [Axis("step", "optimizer step"), Axis("log", "optimizer step, logarithmic", least=0.5)]
    return steps + [axis for axis in others if all(_runs_on(run, axis.field) for run in runs)]


def _runs_on(run: RunView, name: str) -> bool:
    values = [record[name] for record in run.measured]
    return None not in values and len(set(values)) > 1 and all(a <= b for a, b in pairwise(values))
