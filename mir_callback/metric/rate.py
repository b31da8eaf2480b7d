# SPDX-License-Identifier: Apache-2.0
"""The definition of the Modality Integration Rate, for hidden states in memory.

The evaluation of a live model (mir_callback/evaluation/evaluate.py) computes the same number from rows that are spread
over ranks; tests compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mir_callback.errors import NumericsError
from mir_callback.metric.frechet import check_root, check_rows, frechet_from_moments, warn_if_clipped
from mir_callback.metric.matrix_sqrt import GaussianPair
from mir_callback.metric.moments import compute_moments
from mir_callback.metric.tokens import OutlierRule, compute_lower_medians, compute_row_norms, compute_text_scale


@dataclass(frozen=True)
class MIRResult:
    """A Modality Integration Rate.

    Attributes:
        mir: log10 of the sum of the per-layer distances; lower is better aligned; -inf if all are zero.
        per_layer: squared Frechet distance of each decoder layer 1..K, >= 0, in units of the squared mean text norm.
        root: how the trace of the matrix square root was computed, "exact" or "paper_fast".

    Example:
        >>> import torch
        >>> from mir_callback import modality_integration_rate
        >>> rows = torch.tensor([[3.0, 4.0], [0.0, 5.0], [5.0, 0.0]])  # mean norm 5
        >>> modality_integration_rate([rows + 5.0], [rows])
        MIRResult(mir=0.3010299956639812, per_layer=[2.0], root='exact')
    """

    mir: float
    per_layer: list[float]
    root: str


def modality_integration_rate(vision: Sequence[Tensor], text: Sequence[Tensor], *, root: str = "exact") -> MIRResult:
    """MIR of hidden states in memory.

    For each layer: scale both modalities by the inverse mean text norm, replace 3-sigma outliers by the per-dimension
    median of their modality, take the squared Frechet distance. MIR is log10 of the sum over layers.

    Args:
        vision: for each decoder layer the hidden states of all vision tokens, (r, d), any floating dtype, r >= 2;
            those of the last layer after the model's final norm.
        text: for each decoder layer the hidden states of the text tokens after the image, (s, d), s >= 2, same d and
            device.
        root: "exact", or "paper_fast" for the approximation of the authors' fast mode. Their values cannot be compared.

    Returns:
        The rate, its per-layer distances and the root.

    Raises:
        ConfigError: unknown root.
        NumericsError: no layers, different numbers of layers, fewer than two rows, different widths, values that are
            not finite, or a zero mean text norm. The message names layer (counted from 1) and modality.

    Ranks: pure.
    Source: arXiv:2410.07167, section 3. Replacement of outliers and lower medians follow the authors' code.

    Example:
        >>> import torch
        >>> from mir_callback import modality_integration_rate
        >>> rng = torch.Generator().manual_seed(0)
        >>> text = [torch.randn(300, 16, generator=rng) for layer in range(2)]
        >>> vision = [5.0 * torch.randn(400, 16, generator=rng) for layer in range(2)]  # five times as long
        >>> round(modality_integration_rate(vision, text).mir, 2)
        1.53
    """
    check_root(root)
    for name, layers in (("vision", vision), ("text", text)):
        if not isinstance(layers, Sequence):
            raise NumericsError(
                f"{name} is a {type(layers).__name__}. Pass a list with one (N, d) tensor per decoder layer, even for "
                "one layer."
            )
    if len(vision) != len(text) or not len(vision):
        raise NumericsError(
            f"vision has {len(vision)} decoder layers and text has {len(text)}. Pass the same layers of both, at least "
            "one."
        )
    per_layer = []
    for layer, (vision_rows, text_rows) in enumerate(zip(vision, text, strict=True), start=1):
        check_rows(vision_rows, text_rows, where=f"layer {layer}, ")
        scale = compute_text_scale(compute_row_norms(text_rows))
        moments = [compute_moments(replace_outliers(rows), scale) for rows in (vision_rows, text_rows)]
        result = frechet_from_moments(GaussianPair(*moments), root)
        warn_if_clipped(result, layer, root)
        per_layer.append(result.distance)
    return MIRResult(mir=mir_from_distances(per_layer), per_layer=per_layer, root=root)


def mir_from_distances(per_layer: Sequence[float]) -> float:
    """log10 of the sum of per-layer distances; -inf for a zero sum. Ranks: pure."""
    total = math.fsum(per_layer)
    return math.log10(total) if total > 0.0 else -math.inf


def replace_outliers(rows: Tensor) -> Tensor:
    """Rows (N, d) with every 3-sigma outlier replaced by the per-dimension lower median. Ranks: pure.

    Returns the rows themselves if there are no outliers.
    Source: the authors' code (the paper removes outliers); see docs/metric.md.
    """
    norms = compute_row_norms(rows)
    outliers = OutlierRule.from_norms(norms, rows.dtype).outliers(norms)
    if not bool(outliers.any()):
        return rows
    replaced = rows.clone()
    replaced[outliers] = compute_lower_medians(rows)
    return replaced
