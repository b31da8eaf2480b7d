# SPDX-License-Identifier: Apache-2.0
"""The result of one evaluation, and the fields of it that follow from layers and losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mir_callback.evaluation.solve import LayerResult
from mir_callback.metric.bootstrap import compare_spreads, project
from mir_callback.metric.influence import compute_mir_influences, compute_standard_error
from mir_callback.record import shorten


@dataclass(frozen=True)
class MIRReport:
    """The result of one evaluation. The same on every rank.

    Fields have the meaning and unit of the fields of :class:`mir_callback.record.EvalRecord` with the same name.
    ``mir`` is -inf if every distance is zero. ``mir_se``, ``outlier_se_ratio``, ``per_layer_se`` and ``influences`` are
    None with ``standard_error=False``, for one sample, with root "paper_fast", and where they are not finite.
    ``probe_loss`` and the fields of ``vision_gain`` are None unless asked for, and if no sample has two text tokens.

    Example::

        report = evaluate_mir(model, probe, processor=processor)
        print(f"MIR {report.mir:.3f} +- {report.mir_se:.3f} in {report.seconds:.1f} s")
    """

    mir: float
    per_layer: list[float]
    root: str
    seconds: float
    num_samples: int
    num_vision_tokens: int
    num_text_tokens: int
    vision_outliers: list[int]
    text_outliers: list[int]
    probe_fingerprint: str
    text_positions: str
    vision_ids: str | None
    first_sample: str | None
    text_only: str
    prompt: str | None
    tokens_fingerprint: str
    pixels_fingerprint: str
    dtype: str
    world_size: int
    mir_se: float | None
    per_layer_se: list[float] | None
    influences: list[float] | None
    outlier_se_ratio: float | None
    probe_loss: float | None
    vision_gain: float | None
    vision_gain_se: float | None
    vision_gain_influences: list[float] | None
    scale_free_mir: float
    companions: dict[str, list[float]]
    batch_size: int
    passes: int
    storage_device: str
    peak_memory_bytes: int

    def __str__(self) -> str:
        error = "" if self.mir_se is None else f" +- {self.mir_se:.4f}"
        tokens = f"{self.num_vision_tokens} vision and {self.num_text_tokens} text tokens"
        what = f"{len(self.per_layer)} layers, {self.num_samples} samples, {tokens}, {self.root}, {self.dtype}"
        return f"MIR {self.mir:.4f}{error} ({what}, {self.seconds:.1f} s)"

    def to_fields(self) -> dict[str, Any]:
        """As fields of an EvalRecord, where ``mir`` is None and ``error`` says why if it is not finite.

        Companions and standard errors of layers have five significant digits there.
        """
        fields = shorten(asdict(self))
        if not math.isfinite(self.scale_free_mir):
            fields["scale_free_mir"] = None
        if not math.isfinite(self.mir):
            fields |= {"mir": None, "error": "the distance of every layer is zero, so MIR is -inf"}
        return fields


def find_errors(results: Sequence[LayerResult]) -> dict[str, Any]:
    """The fields of a report that follow from the samples' influences; None for what is not finite."""
    fields: dict[str, Any] = dict.fromkeys(("mir_se", "per_layer_se", "influences", "outlier_se_ratio"))
    known = [(result.influences, result.draws) for result in results]
    influences = [each for each, _ in known if each is not None]
    draws = [each for _, each in known if each is not None]
    if not draws:
        return fields
    on_layers, on_draws = torch.stack(influences), torch.stack(draws)
    errors = compute_standard_error(on_layers) * compare_spreads(on_draws)
    if bool(errors.isfinite().all()):
        fields["per_layer_se"] = errors.tolist()
    distances = [result.distance for result in results]
    total = math.fsum(distances)
    if total > 0.0:  # else MIR is -inf
        on_mir = compute_mir_influences(on_layers, distances)
        fixed, anew = on_draws.sum(dim=0)
        by_rule = compute_mir_influences(project(anew - fixed, on_mir.shape[0])[None], distances)
        # To first order a draw may lower a distance below zero.
        ratio = compare_spreads((total + on_draws.sum(dim=0)).clamp_min(0.1 * total).log10()).item()
        error = ratio * compute_standard_error(on_mir).item()
        if math.isfinite(error):
            fields |= {"mir_se": error, "outlier_se_ratio": ratio}
            fields["influences"] = [float(f"{value:.6g}") for value in (on_mir + by_rule).tolist()]
    return fields


def find_losses(losses: Sequence[Tensor]) -> dict[str, Any]:
    """The fields of a report that follow from the losses with the right and with other images; None for what is not.

    Args:
        losses: for each of the two images (n, 2) float64, summed loss and number of predicted tokens of every sample.
    """
    names = ("probe_loss", "vision_gain", "vision_gain_se", "vision_gain_influences")
    fields: dict[str, Any] = dict.fromkeys(names)
    if not losses or not bool(losses[0][:, 1].any()):
        return fields
    right, counts = losses[0].unbind(dim=1)
    predicted = counts.sum()
    fields["probe_loss"] = (right.sum() / predicted).item()
    if len(losses) == 1:
        return fields
    gains = losses[1][:, 0] - right
    gain = gains.sum() / predicted
    fields["vision_gain"] = gain.item()
    influences = len(gains) / predicted * (gains - gain * counts)
    if len(gains) > 1 and bool(influences.isfinite().all()):
        fields["vision_gain_se"] = compute_standard_error(influences).item()
        fields["vision_gain_influences"] = [float(f"{value:.6g}") for value in influences.tolist()]
    return fields
