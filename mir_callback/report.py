# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found, and how it was made."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Wanted:
    """What an evaluation is to find.

    Attributes:
        root: "exact" or "paper_fast".
        standard_error: how far MIR would vary with other samples like the probe's; with the exact root only.
        bias_gauge: MIR with most of the bias of a finite probe removed, from its two halves.
        probe_loss: how well the model predicts the probe's texts.
    """

    root: str = "exact"
    standard_error: bool = True
    bias_gauge: bool = False
    probe_loss: bool = False


@dataclass(frozen=True)
class MIRReport:
    """One evaluation and how it was made. The same on every rank.

    Attributes:
        mir: log10 of the summed per-layer distances.
        per_layer: FD_k of decoder layers 1..K.
        root: "exact" or "paper_fast".
        seconds: wall time of the evaluation on rank 0.
        num_samples: image + text pairs.
        num_vision_tokens: vision rows per layer, over all ranks.
        num_text_tokens: text rows per layer, over all ranks.
        vision_outliers: per layer, how many vision rows the 3-sigma rule replaced.
        text_outliers: the same for text rows.
        probe_fingerprint: which probe (contents and encoding rules).
        tokens_fingerprint: which token ids it became; differs between tokenizers and image token counts.
        pixels_fingerprint: which pixel inputs the first images became; differs between image processor settings.
        dtype: dtype of the hidden states.
        world_size: number of ranks that took part.
        mir_se: standard error of ``mir`` over draws of the probe's samples, in the same log10 units; None where it was
            not asked for, or cannot be told (one sample, root "paper_fast").
        per_layer_se: of each FD; None with it.
        influences: per sample of the probe, in its order, how much it moves ``mir``, to first order and in its units;
            None with it. What two values on the same probe differ by has the standard error of the differences.
        mir_extrapolated: MIR with most of the bias of a finite probe removed (:mod:`mir_callback.engine.halves`); None
            where it was not asked for, or the probe has too few samples or tokens for halves.
        probe_loss: mean negative log-likelihood of the probe's text tokens given image and text before them, in nats;
            None where it was not asked for. Its exponential is the perplexity.
        companions: by name, per layer, see :func:`mir_callback.metric.companions.companions_of`.
        batch_size: samples per forward on each rank, after what memory sufficed for.
        passes: how often the probe was forwarded; more than once where not all layers' rows could be kept.
        stash: where rows waited to be measured: "device", or "host" if those of any rank and layer did in its memory.
        peak_memory_bytes: the most an evaluation took at a time beyond what was held before, on the rank that took
            most; of the GPU, or of the process where the model is on the CPU.
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
    tokens_fingerprint: str
    pixels_fingerprint: str
    dtype: str
    world_size: int
    mir_se: float | None
    per_layer_se: list[float] | None
    influences: list[float] | None
    mir_extrapolated: float | None
    probe_loss: float | None
    companions: dict[str, list[float]]
    batch_size: int
    passes: int
    stash: str
    peak_memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON-ready values."""
        return asdict(self)
