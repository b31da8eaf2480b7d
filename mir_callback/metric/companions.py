# SPDX-License-Identifier: Apache-2.0
"""What else the moments of a layer tell, at next to no cost: why a distance is what it is."""

from __future__ import annotations

from mir_callback.metric.factors import Factored
from mir_callback.metric.moments import Moments

# Names of the values, as reports and logs have them.
COMPANIONS = ("mean_part", "covariance_part", "norm_ratio", "cosine", "vision_rank", "text_rank")


def companions_of(
    vision: Moments | Factored, text: Moments | Factored, distance: float, vision_norm: float, text_norm: float
) -> dict[str, float]:
    """Companions of one layer's distance.

    Args:
        vision: moments of the scaled vision rows, outliers replaced.
        text: the same of the text rows.
        distance: their FD.
        vision_norm: mean norm of the raw vision rows, outliers included.
        text_norm: the same of the text rows.

    Returns:
        By the names in COMPANIONS: the part of FD that the means' gap makes, and the rest, which the covariances
        make; the norms' ratio; the cosine between the two means; the effective rank (tr S)^2 / tr S^2 of each
        covariance, between 1 and d, 0 for rows that are all alike.

    Ranks: pure.
    """
    mean_part = (vision.mean - text.mean).square().sum().item()
    lengths = (vision.mean.norm() * text.mean.norm()).item()
    return {
        "mean_part": mean_part,
        "covariance_part": distance - mean_part,
        "norm_ratio": vision_norm / text_norm,
        "cosine": (vision.mean @ text.mean).item() / lengths if lengths > 0.0 else 0.0,
        "vision_rank": effective_rank(vision),
        "text_rank": effective_rank(text),
    }


def effective_rank(moments: Moments | Factored) -> float:
    """(tr S)^2 / tr S^2, the number of equally strong directions that would look alike. Ranks: pure."""
    size = moments.size.item()
    return (moments.trace.item() / size) ** 2 if size > 0.0 else 0.0
