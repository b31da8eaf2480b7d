# SPDX-License-Identifier: Apache-2.0
"""One evaluation of MIR on a live model, on one process or on all ranks of a training run.

The recipe: observe -> forward this rank's batches -> share norms -> decide scale and outliers -> share medians and
sums -> every layer's scatter to its owner (layer mod world size) -> owner solves -> share its transport maps -> every
rank's samples' influences -> share K distances and their sums.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import chain
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from mir_callback import collectives
from mir_callback.engine.capacity import check_budget, device_of
from mir_callback.engine.distances import Solving
from mir_callback.engine.observation import observe
from mir_callback.engine.parts import Part, mean_loss, measured, report_of
from mir_callback.engine.peak import PeakMeter, peak_memory
from mir_callback.engine.sample_rows import SampleRows
from mir_callback.engine.work import Background, Steps, run_now
from mir_callback.errors import ConfigError
from mir_callback.metric.frechet import check_root
from mir_callback.model.decoder import find_decoder
from mir_callback.model.memory import check_capture_budget, this_machine
from mir_callback.model.text_loss import TextLoss
from mir_callback.probe.adapter import Adapter
from mir_callback.probe.batches import EncodedProbe, encode_probe
from mir_callback.probe.huggingface import HuggingFaceAdapter
from mir_callback.probe.samples import Probe
from mir_callback.progress import Tell, nobody, progress_bar
from mir_callback.report import MIRReport, Wanted

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
    """One evaluation, see :mod:`mir_callback.engine.work`; ``groups`` as :class:`Solving` has them."""
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
