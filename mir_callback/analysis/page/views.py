# SPDX-License-Identifier: Apache-2.0
"""A run as the page sees it, what it can show of each evaluation and layer, and the axes it can be drawn over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from mir_callback.analysis.compare import Recipe
from mir_callback.analysis.load import Run, noted_losses
from mir_callback.analysis.page.charts import Kind
from mir_callback.record import FIELDS, STOPPING, EvalRecord, lowest_record

PLANNED = "planned steps"  # among the settings of a run
# Evaluations of a run that are shown, and what the page calls them.
MOMENTS = {"first": "first", "best": "lowest", "last": "last"}
WOULD_STOP = "would stop"  # of a rule that only observes, where it has found the plateau
# What the rule says, and its class name.
VERDICTS = {
    **{verdict: verdict.replace(" ", "-") for verdict in ("going on", "rising", "too noisy", "no data", "failed")},
    **dict.fromkeys((STOPPING, WOULD_STOP), "plateau"),
}


@dataclass(frozen=True)
class Quantity:
    """A number of each layer."""

    name: str  # in the records
    label: str
    kind: Kind  # of its scale
    meaning: str

    def read(self, record: EvalRecord) -> list[float]:
        """The values of a record, one for each layer; empty if it has none."""
        found = record.per_layer if self.name == DISTANCE.name else (record.companions or {}).get(self.name)
        return found or []


DISTANCE = Quantity(
    "per_layer",
    "distance FD",
    "log",
    "How far apart vision and text tokens are; MIR is log10 of the sum. The last layer is behind the final norm.",
)
_COMPANIONS = (
    Quantity("mean_part", "FD: part of the means", "log", "Squared distance between the two mean vectors."),
    Quantity("covariance_part", "FD: part of the spreads", "log", "What differing covariances add to the distance."),
    Quantity(
        "norm_ratio", "norm ratio", "log", "Mean norm of vision tokens over that of text tokens; 1 is equally long."
    ),
    Quantity(
        "cosine", "cosine of the means", "linear", "1: both modalities lie in the same direction from the origin."
    ),
    Quantity("vision_rank", "effective rank, vision", "log", "How many directions the vision tokens really use."),
    Quantity("text_rank", "effective rank, text", "log", "How many directions the text tokens really use."),
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
        group = None if label == recipe.name else recipe.name
        return cls(label, run.records, run.losses, settings, run.problems, group)

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
        """First, best and last evaluation; without a trained value the best is the first. Empty if there is none."""
        if not self.measured:
            return {}
        best = lowest_record(self.measured) or self.measured[0]
        return {"first": self.measured[0], "best": best, "last": self.measured[-1]}

    @cached_property
    def loss_points(self) -> list[tuple[int, float]]:
        """Logged losses, or those that the evaluations noted if the log is not at hand."""
        return list(self.losses or noted_losses(self.records))

    def distinct(self, name: str) -> list[Any]:
        """The different values of a field over the run, of another version's too, in order of appearance."""
        found: list[Any] = []
        for record in self.records:
            value = record[name] if name in FIELDS else record.unknown.get(name)
            if value is not None and value not in found:
                found.append(value)
        return found


def read_verdict(record: EvalRecord) -> str:
    """What the stop rule said; "failed" where the evaluation did; "" without a rule."""
    if record.mir is None:
        return "failed"
    return WOULD_STOP if record.would_stop and record.verdict != STOPPING else record.verdict or ""


def time_share(record: EvalRecord) -> float | None:
    """The part of the time so far that went into evaluations; None before the first step."""
    spent, trained = record.eval_seconds, record.train_seconds
    if spent is None or trained is None or record.step == 0 or spent + trained <= 0:
        return None
    return float(spent / (spent + trained))


def list_companions(runs: Sequence[RunView]) -> list[Quantity]:
    """The companions that at least one evaluation has; those of other names come last, under their own name."""
    records = [record for run in runs for record in run.measured]
    present = {name for record in records for name, values in (record.companions or {}).items() if values}
    others = sorted(present - {quantity.name for quantity in _COMPANIONS})
    known = [quantity for quantity in _COMPANIONS if quantity.name in present]
    return known + [Quantity(name, name.replace("_", " "), "linear", "") for name in others]


def stack_layers(quantity: Quantity, records: Sequence[EvalRecord]) -> np.ndarray:
    """The values of evaluations side by side, (layers, evaluations) float64; NaN where there is none."""
    columns = [quantity.read(record) for record in records]
    table = np.full((max(map(len, columns), default=0), len(records)), np.nan)
    for number, column in enumerate(columns):
        table[: len(column), number] = column
    return table


def number_colours(runs: Sequence[RunView]) -> list[int]:
    """A number for each run, the same one for runs of one recipe; from 0 in order of appearance."""
    owners = [number if run.recipe is None else run.recipe for number, run in enumerate(runs)]
    distinct = list(dict.fromkeys(owners))
    return [distinct.index(owner) for owner in owners]


@dataclass(frozen=True)
class Axis:
    """Something that runs on while a model trains."""

    name: str  # for the page's switch and its address
    label: str  # with the unit
    field: str  # of a record
    logarithmic: bool = False
    unit: float = 1.0  # values are divided by it

    def locate(self, run: RunView, steps: Sequence[int]) -> np.ndarray:
        """Where steps of a run lie on this axis; NaN for steps that its evaluations do not span. (n,) float64."""
        asked = np.asarray(steps, dtype=float)
        if self.field == "step":
            return asked
        values = [record[self.field] / self.unit for record in run.measured]
        known = [record.step for record in run.measured]
        found: np.ndarray = np.interp(asked, known, values, left=np.nan, right=np.nan)
        return found


def find_axes(runs: Sequence[RunView]) -> list[Axis]:
    """The axes that all evaluations of all runs have a position on; steps first."""
    # Training alone, carried over restarts; else what has passed since the process began, evaluations included.
    own = all(_runs_on(run, "train_seconds") for run in runs)
    clock, words = ("train_seconds", "training time") if own else ("elapsed", "time since the start")
    longest = max((record[clock] or 0.0 for run in runs for record in run.measured), default=0.0)
    units = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
    unit, name = next((unit, name) for unit, name in units if longest >= 3 * unit or unit == 1.0)
    candidates = [
        Axis("time", f"{words}, {name}", clock, unit=unit),
        Axis("samples", "training samples seen", "samples_seen"),
        Axis("tokens", "training tokens seen", "tokens_seen"),
        Axis("epoch", "epoch", "epoch"),
    ]
    steps = [Axis("step", "optimizer step", "step"), Axis("log", "optimizer step, logarithmic", "step", True)]
    return steps + [axis for axis in candidates if all(_runs_on(run, axis.field) for run in runs)]


def _runs_on(run: RunView, name: str) -> bool:
    values = [record[name] for record in run.measured]
    return None not in values and len(set(values)) > 1 and all(a <= b for a, b in pairwise(values))
