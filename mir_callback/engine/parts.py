# SPDX-License-Identifier: Apache-2.0
"""What was found of the layers whose rows were there at a time, and the report that all of them add up to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from mir_callback.engine.clouds import LayerClouds, replace_outliers, share_norms
from mir_callback.engine.distances import Distances, Solving, distances, joined
from mir_callback.engine.halves import LEAST_SAMPLES, extrapolated, half_of
from mir_callback.engine.sample_rows import SampleRows
from mir_callback.engine.work import Steps
from mir_callback.metric.companions import COMPANIONS
from mir_callback.metric.influence import rate_influences, standard_error
from mir_callback.metric.rate import rate_of
from mir_callback.progress import Tell
from mir_callback.report import MIRReport


@dataclass(frozen=True)
class Part:
    """What was found of some layers; holds none of their rows.

    Attributes:
        found: distances, companions and influences.
        halves: distances of the two halves of the probe, or none.
        vision_tokens: rows of each layer.
        text_tokens: the same of text.
        vision_outliers: per layer, rows replaced.
        text_outliers: the same of text.
        dtype: of the hidden states.
    """

    found: Distances
    halves: list[list[float]]
    vision_tokens: int
    text_tokens: int
    vision_outliers: list[int]
    text_outliers: list[int]
    dtype: str


def measured(
    rows: list[tuple[Tensor, Tensor]], samples: SampleRows, how: Solving, *, bias_gauge: bool, bar: tqdm, tell: Tell
) -> Steps[Part]:
    """Measure layers from this rank's vision and text rows of each; outliers among them are overwritten. Collective."""
    tell("norms of all tokens")
    layers = share_norms(rows)
    tell("outlier medians")
    replace_outliers(layers)
    found = yield from distances(layers, samples, how, bar, tell)
    halves = (yield from _halves(layers, samples, how, tell)) if bias_gauge else []
    first = layers[0]
    return Part(
        found,
        halves,
        vision_tokens=first.vision.count,
        text_tokens=first.text.count,
        vision_outliers=[layer.vision.replaced for layer in layers],
        text_outliers=[layer.text.replaced for layer in layers],
        dtype=str(first.vision.rows.dtype).removeprefix("torch."),
    )


def _halves(layers: list[LayerClouds], samples: SampleRows, how: Solving, tell: Tell) -> Steps[list[list[float]]]:
    """Distances of both halves of the probe; none where a half would have fewer than two rows of a modality."""
    if samples.num_samples < LEAST_SAMPLES:
        return []
    found = []
    plainly = Solving(how.root, False, how.together, how.maps_together, how.first)
    for parity in (0, 1):
        half: list[LayerClouds] = yield partial(half_of, layers, samples, parity)
        if min(half[0].vision.count, half[0].text.count) < 2:
            return []
        with tqdm(disable=True) as hidden:
            found.append((yield from distances(half, samples, plainly, hidden, tell)).per_layer)
    return found


def report_of(parts: Sequence[Part], made: dict[str, Any]) -> MIRReport:
    """The report of all layers.

    Args:
        parts: in the order of the layers.
        made: the fields that are not of the layers.

    Ranks: pure.
    """
    found = joined([part.found for part in parts])
    halves = [
        [distance for part in parts for distance in part.halves[parity]] for parity in range(len(parts[0].halves))
    ]
    return MIRReport(
        mir=rate_of(found.per_layer),
        per_layer=found.per_layer,
        num_vision_tokens=parts[0].vision_tokens,
        num_text_tokens=parts[0].text_tokens,
        vision_outliers=[count for part in parts for count in part.vision_outliers],
        text_outliers=[count for part in parts for count in part.text_outliers],
        dtype=parts[0].dtype,
        companions={name: [layer[name] for layer in found.companions] for name in COMPANIONS},
        mir_extrapolated=_finite(extrapolated(found.per_layer, halves)) if halves else None,
        **_uncertainty(found),
        **made,
    )


def mean_loss(sums: Sequence[tuple[float, int]]) -> float | None:
    """Mean over tokens, from the ranks' sums and numbers of tokens; None without any. Ranks: pure."""
    count = sum(number for _, number in sums)
    return math.fsum(total for total, _ in sums) / count if count else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _uncertainty(found: Distances) -> dict[str, Any]:
    """The fields of a report that come from the samples' influences."""
    if found.influences is None:
        return {"mir_se": None, "per_layer_se": None, "influences": None}
    layers_se = standard_error(found.influences).tolist()
    if math.fsum(found.per_layer) == 0.0:  # no logarithm to have an error
        return {"mir_se": None, "per_layer_se": layers_se, "influences": None}
    on_rate = rate_influences(found.influences, found.per_layer)
    rounded = [float(f"{value:.6g}") for value in on_rate.tolist()]
    return {"mir_se": standard_error(on_rate).item(), "per_layer_se": layers_se, "influences": rounded}
