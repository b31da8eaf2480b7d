# SPDX-License-Identifier: Apache-2.0
"""One evaluation of MIR on a live model, on one process or on all ranks of a training run.

The recipe: observe -> forward this rank's batches -> share norms -> decide scale and outliers -> share medians and
sums -> every layer's scatter to its owner (layer mod world size) -> owner solves -> share its transport maps -> every
rank's samples' influences -> share K distances and their sums.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm

from mir_callback import distributed as collectives
from mir_callback.errors import ConfigError
from mir_callback.evaluation.forward import observe
from mir_callback.evaluation.halves import LEAST_SAMPLES, extrapolated, half_of
from mir_callback.evaluation.hidden_states import check_budget, device_of
from mir_callback.evaluation.memory import PeakMeter, check_capture_budget, peak_memory, this_machine
from mir_callback.evaluation.solve import Distances, Solving, distances, joined
from mir_callback.evaluation.token_statistics import LayerClouds, SampleRows, replace_outliers, share_norms
from mir_callback.evaluation.work import Background, Steps, run_now
from mir_callback.metric.frechet import COMPANIONS, check_root
from mir_callback.metric.influence import rate_influences, standard_error
from mir_callback.metric.rate import rate_of
from mir_callback.model.decoder import find_decoder
from mir_callback.model.text_loss import TextLoss
from mir_callback.probe.adapters import Adapter, HuggingFaceAdapter
from mir_callback.probe.batches import EncodedProbe, encode_probe
from mir_callback.probe.probe import Probe
from mir_callback.watchdog import Tell, nobody, progress_bar


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
        mir_extrapolated: MIR with most of the bias of a finite probe removed (:mod:`mir_callback.evaluation.halves`); None
            where it was not asked for, or the probe has too few samples or tokens for halves.
        probe_loss: mean negative log-likelihood of the probe's text tokens given image and text before them, in nats;
            None where it was not asked for. Its exponential is the perplexity.
        companions: by name, per layer, see :func:`mir_callback.metric.frechet.companions_of`.
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


DEFAULT_BATCH_SIZE = 4
_DEFAULTS = Wanted()
_EVERY_LAYER = 2**31
_MAPS_TOGETHER = 8  # layers whose maps each rank holds at a time beside training


def evaluate_mir(
    model: nn.Module,
    probe: Probe,
    *,
    processor: Any = None,
    adapter: Adapter | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    root: str = "exact",
    standard_error: bool = True,
    bias_gauge: bool = False,
    probe_loss: bool = False,
    capture_budget_gb: float | None = None,
    optimizer: Any = None,
    progress: bool = True,
) -> MIRReport:
    """Compute MIR of a model as it stands, and leave it as it stood.

    Args:
        model: a Hugging Face vision-language model, bare or wrapped (DDP, DeepSpeed engine, PEFT).
        probe: the samples; the same on every rank.
        processor: the model's processor (image processor and tokenizer); not needed with an adapter.
        adapter: for models that are not Hugging Face's own, see `llava_integration`.
        batch_size: samples per forward on each rank; halved on all if memory does not suffice.
        root: "exact", or "paper_fast" to compare with values of the authors' fast mode.
        standard_error: also find how far MIR would vary with other samples like these (exact root only).
        bias_gauge: also find MIR with most of the bias of a finite probe removed; solves twice more.
        probe_loss: also find how well the model predicts the probe's texts; takes the logits of all text positions.
        capture_budget_gb: GB (10^9 bytes) that the token rows of all layers may take on each rank's device; by default
            half of what is free. What does not fit waits in pinned host memory, and what does not fit there either is
            left to a further pass over the probe.
        optimizer: the run's optimizer, while a model trains: weights that ZeRO-3 has gathered for a bare model are
            released through it (or the engine), and schedule-free ones evaluate other weights than they train.
        progress: show a progress bar on rank 0 if the evaluation takes more than a few seconds.

    Returns:
        The report, the same on every rank.

    Raises:
        ConfigError, ProbeError, UnsupportedModelError: before any forward; on every rank if on one.
        NumericsError: hidden states that are not finite or too few tokens; on every rank.

    Ranks: collective. Every rank must call it with the same probe and options.
    Source: arXiv:2410.07167, section 3.
    """
    adapter = adapter_for(model, processor, adapter)
    wanted = Wanted(root, standard_error, bias_gauge, probe_loss)
    encoded = encode_for(
        model, probe, adapter, batch_size=batch_size, wanted=wanted, capture_budget_gb=capture_budget_gb
    )
    return evaluate_encoded(model, encoded, adapter, wanted=wanted, optimizer=optimizer, progress=progress)


def adapter_for(model: nn.Module, processor: Any, adapter: Adapter | None = None) -> Adapter:
    """The adapter given, or Hugging Face's for this model and processor; if that fails on one rank, on all.

    Raises:
        ConfigError, UnsupportedModelError: as :class:`HuggingFaceAdapter`.

    Ranks: collective.
    """
    with collectives.all_or_none():
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model must be a torch module, got {type(model).__name__}; pass trainer.model")
        adapter = HuggingFaceAdapter(model, processor) if adapter is None else adapter
    assert adapter is not None
    return adapter


def encode_for(
    model: nn.Module,
    probe: Probe,
    adapter: Adapter,
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    wanted: Wanted = _DEFAULTS,
    capture_budget_gb: float | None = None,
) -> EncodedProbe:
    """Check everything that can be checked without a forward, on all ranks, and encode this rank's share.

    Returns:
        What :func:`evaluate_encoded` takes; it can be used again and again while the model trains.

    Raises:
        MIRError: as :func:`evaluate_mir`; if it fails on one rank it fails on all.

    Ranks: collective.
    """
    with collectives.all_or_none():
        check_root(wanted.root)
        check_capture_budget(capture_budget_gb)
        if not isinstance(probe, Probe):
            raise ConfigError(f"probe must be a Probe, got {type(probe).__name__}; see Probe.from_folders, Probe.load")
        find_decoder(model)
        world = collectives.world_size()
        encoded = encode_probe(probe, adapter, rank=collectives.rank(), world_size=world, batch_size=batch_size)
        if wanted.probe_loss and any(batch.text_ids is None for batch in encoded.batches):
            raise ConfigError(
                f"probe_loss must come with an adapter that tells the ids of texts (AdaptedBatch.text_ids), got "
                f"{type(adapter).__name__}, which does not; switch it off"
            )
        check_budget(model, encoded, capture_budget_gb)
    collectives.require_same(
        probe_fingerprint=encoded.fingerprint, batch_size=batch_size, wanted=wanted, capture_budget_gb=capture_budget_gb
    )
    told = collectives.gather_objects((encoded.digests, encoded.pixel_digests, this_machine()))
    tokens, pixels, machines = zip(*told, strict=True)
    return replace(
        encoded,
        digests=tuple(chain.from_iterable(tokens)),
        pixel_digests=tuple(chain.from_iterable(pixels)),
        ranks_here=machines.count(this_machine()),
        capture_budget_gb=capture_budget_gb,
    )


def evaluate_encoded(
    model: nn.Module,
    encoded: EncodedProbe,
    adapter: Adapter,
    *,
    wanted: Wanted = _DEFAULTS,
    optimizer: Any = None,
    progress: bool = True,
    tell: Tell = nobody,
) -> MIRReport:
    """:func:`evaluate_mir` on an already encoded probe; ``tell`` hears what this rank begins to do. Collective."""
    together = collectives.world_size()  # ranks solve side by side, each one layer at a time
    with progress_bar(shown=progress and collectives.is_main()) as bar, peak_memory(device_of(model)) as peak:
        groups = (together, together)
        return run_now(_steps(model, encoded, adapter, wanted, optimizer, groups, bar, tell, peak))


def evaluate_beside(
    model: nn.Module,
    encoded: EncodedProbe,
    adapter: Adapter,
    *,
    wanted: Wanted = _DEFAULTS,
    optimizer: Any = None,
    tell: Tell = nobody,
) -> Background[MIRReport]:
    """Begin an evaluation of the model as it stands, whose solves go on beside what the caller does next.

    The forwards and the moments are done on return; the model may change then. Rows, and the moments of all layers,
    are held until :meth:`Background.advance` says that it has finished. Where rows need several passes over the probe,
    all but the last are measured first. The peak memory reported is that until the return.

    Ranks: collective.
    """
    groups = (_EVERY_LAYER, max(collectives.world_size(), _MAPS_TOGETHER))
    with progress_bar(shown=False) as bar, peak_memory(device_of(model)) as peak:
        return Background(_steps(model, encoded, adapter, wanted, optimizer, groups, bar, tell, peak))


def _steps(
    model: nn.Module,
    encoded: EncodedProbe,
    adapter: Adapter,
    wanted: Wanted,
    optimizer: Any,
    groups: tuple[int, int],
    bar: tqdm,
    tell: Tell,
    peak: PeakMeter,
) -> Steps[MIRReport]:
    """One evaluation, see :mod:`mir_callback.evaluation.work`; ``groups`` as :class:`Solving` has them."""
    started = time.perf_counter()
    parts: list[Part] = []
    made: dict[str, Any] = {}
    samples: SampleRows | None = None
    text_loss: TextLoss | None = None
    for seen in observe(model, encoded, adapter, optimizer, wanted.probe_loss, bar, tell, peak.look):
        samples = samples or SampleRows.shared(seen.sample_rows)
        text_loss = text_loss or seen.text_loss
        errors = wanted.standard_error and wanted.root == "exact" and samples.num_samples > 1
        # Before a further forward the model must not change, so nothing is left for later.
        together = groups if seen.final else (collectives.world_size(), collectives.world_size())
        how = Solving(wanted.root, errors, *together, first=seen.first)
        steps = measured(seen.rows, samples, how, bias_gauge=wanted.bias_gauge, bar=bar, tell=tell)
        parts.append((yield from steps) if seen.final else run_now(steps))
        made = {"passes": seen.passes, "stash": seen.place}
    loss = (0.0, 0) if text_loss is None else (text_loss.total, text_loss.count)
    everyone = collectives.gather_objects((time.perf_counter() - started, peak.extra_bytes, loss))
    made |= {
        "root": wanted.root,
        "seconds": everyone[0][0],
        "num_samples": encoded.num_samples,
        "probe_fingerprint": encoded.fingerprint,
        "tokens_fingerprint": encoded.tokens_fingerprint,
        "pixels_fingerprint": encoded.pixels_fingerprint,
        "world_size": collectives.world_size(),
        "batch_size": encoded.share.batch_size,
        "peak_memory_bytes": max(extra for _, extra, _ in everyone),
        "probe_loss": mean_loss([loss for _, _, loss in everyone]),
    }
    return report_of(parts, made)
