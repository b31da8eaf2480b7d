# SPDX-License-Identifier: Apache-2.0
"""An independent float64 reference of MIR in NumPy and SciPy, written from the definition, sharing no code with us.

The trace of the matrix square root is the nuclear norm of R_v R_t^T, with R the triangular factors of the centred rows
themselves: no covariance is ever formed, so that ill-conditioned clouds lose no digits here.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch


@torch.no_grad()
def hidden_rows(model, processor, samples):
    """Vision and text rows of every layer, from the hidden states that the model itself returns for each sample."""
    vision, text = [], []
    for image, words in samples:
        inputs = processor(images=[[image]], text=[processor.image_token + words], return_tensors="pt")
        states = model.eval()(**inputs, output_hidden_states=True).hidden_states[1:]
        image_at = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
        vision.append([state[0, image_at] for state in states])
        text.append([state[0, image_at[-1] + 1 :] for state in states])
    return [[torch.cat(layer) for layer in zip(*rows, strict=True)] for rows in (vision, text)]


def to_numpy(rows: torch.Tensor) -> np.ndarray:
    """Rows as float64."""
    return rows.detach().to(torch.float64).numpy()


def frechet(vision: np.ndarray, text: np.ndarray) -> float:
    """Squared Frechet distance of two row matrices."""
    factors = []
    for rows in (vision, text):
        centred = (rows - rows.mean(axis=0)) / np.sqrt(len(rows) - 1)
        factors.append(np.linalg.qr(centred, mode="r"))
    gap = ((vision.mean(axis=0) - text.mean(axis=0)) ** 2).sum()
    root = scipy.linalg.svdvals(factors[0] @ factors[1].T).sum()
    return float(gap + (factors[0] ** 2).sum() + (factors[1] ** 2).sum() - 2 * root)


def frechet_by_sqrtm(vision: np.ndarray, text: np.ndarray) -> float:
    """The same through scipy's matrix square root of the product of covariances, for well-conditioned clouds."""
    covariances = [np.cov(rows, rowvar=False) for rows in (vision, text)]
    gap = ((vision.mean(axis=0) - text.mean(axis=0)) ** 2).sum()
    root = np.trace(scipy.linalg.sqrtm(covariances[0] @ covariances[1])).real
    return float(gap + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * root)


def frechet_paper_fast(vision: np.ndarray, text: np.ndarray) -> float:
    """The distance with tr(S_v S_t) as its last term."""
    covariances = [np.cov(rows, rowvar=False) for rows in (vision, text)]
    gap = ((vision.mean(axis=0) - text.mean(axis=0)) ** 2).sum()
    return float(
        gap + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.trace(covariances[0] @ covariances[1])
    )


# How far apart equal norms may lie, relative to the median, by the dtype of the rows.
EQUAL = {torch.float64: 2.0**-20, torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def without_outliers(rows: np.ndarray, equal: float = 0.0) -> np.ndarray:
    """Rows more than three unbiased standard deviations from the lower median norm become the lower median row."""
    norms = np.sqrt((rows**2).sum(axis=1))
    middle = np.sort(norms)[(len(norms) - 1) // 2]
    outlier = np.abs(norms - middle) > max(3 * norms.std(ddof=1), equal * middle)
    median = np.sort(rows, axis=0)[(len(rows) - 1) // 2]
    return np.where(outlier[:, None], median, rows)


def rate(vision: list[torch.Tensor], text: list[torch.Tensor], distance=frechet) -> tuple[float, list[float]]:
    """MIR and its per-layer distances."""
    distances = []
    for pair in zip(vision, text, strict=True):
        alpha = 1 / np.sqrt((to_numpy(pair[1]) ** 2).sum(axis=1)).mean()
        clean = [without_outliers(to_numpy(rows) * alpha, EQUAL[rows.dtype]) for rows in pair]
        distances.append(max(0.0, distance(*clean)))
    return float(np.log10(sum(distances))), distances
