# SPDX-License-Identifier: Apache-2.0
"""What is known of every layer at an evaluation: its distance, and the companions that say why it is what it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mir_callback.analysis.page.scales import Kind
from mir_callback.analysis.page.views import RunView
from mir_callback.training.history import Record


@dataclass(frozen=True)
class Quantity:
    """A number of each layer.

    Attributes:
        name: in the records.
        label: on the page.
        kind: of its scale.
        meaning: a sentence for those who have not read the definition.
    """

    name: str
    label: str
    kind: Kind
    meaning: str

    def of(self, record: Record) -> list[float] | None:
        """The values of a record, one for each layer; None if it has none."""
        found = (
            record.get("per_layer") if self.name == DISTANCE.name else (record.get("companions") or {}).get(self.name)
        )
        return found or None


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


def companions_of(runs: Sequence[RunView]) -> list[Quantity]:
    """The companions that at least one evaluation has; those of other names come last, under their own name."""
    present = {
        name
        for run in runs
        for record in run.measured
        for name, values in (record.get("companions") or {}).items()
        if values
    }
    known = [quantity for quantity in _COMPANIONS if quantity.name in present]
    others = sorted(present - {quantity.name for quantity in _COMPANIONS})
    return known + [Quantity(name, name.replace("_", " "), "linear", "") for name in others]


def over_layers(quantity: Quantity, records: Sequence[Record]) -> np.ndarray:
    """The values of evaluations side by side, (layers, evaluations) float64; NaN where there is none."""
    columns = [quantity.of(record) or [] for record in records]
    table = np.full((max(map(len, columns), default=0), len(records)), np.nan)
    for number, column in enumerate(columns):
        table[: len(column), number] = column
    return table
