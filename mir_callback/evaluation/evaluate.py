# SPDX-License-Identifier: Apache-2.0
"""One evaluation of MIR on a live model, on one process or on all ranks of a training run.

The recipe, in :meth:`Evaluator.evaluate`: forward this rank's batches -> share norms -> decide scale and outliers ->
every layer's moments to its owner (layer mod world size), who solves -> its transport maps to all -> every rank's
samples' influences -> K distances and their sums to all.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from mir_callback import distributed
from mir_callback.config import MIRConfig, with_options
from mir_callback.errors import ConfigError
from mir_callback.evaluation.forward import OutOfMemory, forward_probe
from mir_callback.evaluation.hidden_states import GB, ExpectedRows, budget_error
from mir_callback.evaluation.memory import PeakMemory, find_device, find_machine, free_memory
from mir_callback.evaluation.solve import LayerResult, solve_layers
from mir_callback.evaluation.token_statistics import TEXT, VISION, SampleRows, clean_rows
from mir_callback.metric.frechet import COMPANIONS
from mir_callback.metric.influence import compute_mir_influences, compute_standard_error
from mir_callback.metric.rate import mir_from_distances
from mir_callback.model.capture import TextLoss
from mir_callback.model.decoder import find_decoder
from mir_callback.probe.adapters import Adapter, find_adapter
from mir_callback.probe.batches import ProbeBatch, encode_probe, encode_shard
from mir_callback.probe.probe import Probe
from mir_callback.record import DEFINITION_FIELDS
from mir_callback.watchdog import enter_phase

_OPTION_GROUPS = ("measure", "memory")
_ALIKE_ON_RANKS = ("batch_size", "root", "standard_error", "probe_loss", "capture_budget_gb")
_BAR_DELAY_SECONDS = 3.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MIRReport:
    """One evaluation and how it was made. The same on every rank.

    Every field is the one of :class:`mir_callback.record.EvalRecord` with this name, which tells its meaning and unit.
    ``mir`` is -inf if every distance is zero. ``mir_se``, ``per_layer_se`` and ``influences`` are None where they were
    not asked for or cannot be told (one sample, root "paper_fast").
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
    probe_loss: float | None
    companions: dict[str, list[float]]
    batch_size: int
    passes: int
    storage_device: str
    peak_memory_bytes: int

    def to_fields(self) -> dict[str, Any]:
        """Fields of a record; without a finite value ``mir`` is None and ``error`` says why."""
        fields = asdict(self)
        if not math.isfinite(self.mir):
            fields |= {"mir": None, "error": "every distance is zero: vision and text tokens cannot be told apart"}
        return fields


class _Bar(tqdm):  # type: ignore[misc]  # its types are not looked at
    """A full disk or a closed pipe behind stderr costs the bar, and not the evaluation."""

    def update(self, n: float | None = 1) -> None:
        """See tqdm."""
        with suppress(OSError, ValueError):
            super().update(n)

    def close(self) -> None:
        """See tqdm."""
        with suppress(OSError, ValueError):
            super().close()


def evaluate_mir(
    model: nn.Module,
    probe: Probe,
    *,
    processor: Any = None,
    adapter: Adapter | None = None,
    batch_size: int = 4,
    optimizer: Any = None,
    progress: bool = True,
    **options: Any,
) -> MIRReport:
    """Compute MIR of a model as it stands, and leave it as it stood.

    Args:
        model: a vision-language model, bare or wrapped (DDP, DeepSpeed engine, PEFT).
        probe: the samples; the same on every rank.
        processor: the model's processor (image processor and tokenizer); not needed with an adapter.
        adapter: for models of a family that is not known, see :class:`mir_callback.probe.adapters.Adapter`.
        batch_size: samples per forward on each rank; halved on all if memory does not suffice.
        optimizer: the run's optimizer, while a model trains: weights that ZeRO-3 has gathered for a bare model are
            released through it (or the engine), and schedule-free ones evaluate other weights than they train.
        progress: show a progress bar on rank 0 if the evaluation takes more than a few seconds.
        **options: of :class:`MIRConfig`, those of what is measured (``root``, ``standard_error``, ``probe_loss``,
            ``conversation``) and of memory (``capture_budget_gb``). Token rows beyond the budget wait in pinned host
            memory, and what does not fit there either is left to a further pass over the probe.

    Returns:
        The report, the same on every rank.

    Raises:
        ConfigError, ProbeError, UnsupportedModelError: before any forward; on every rank if on one.
        NumericsError: hidden states that are not finite or too few tokens; on every rank.

    Ranks: collective. Every rank must call it with the same probe and options.
    Source: arXiv:2410.07167, section 3.
    """
    with distributed.fail_together():
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model must be a torch module, got {type(model).__name__}; pass trainer.model")
        config = MIRConfig.from_options({"batch_size": batch_size, **options}, _OPTION_GROUPS)
        if adapter is None:
            adapter = find_adapter(model, processor, conversation=config.conversation)
    return Evaluator(model, probe, adapter, config).evaluate(model, optimizer=optimizer, progress=progress)


with_options(evaluate_mir, _OPTION_GROUPS)


class Evaluator:
    """Evaluates one model on one probe, again and again while it trains.

    The probe is encoded on construction, which fails, on all ranks alike, with all that can be found without a forward.
    What evaluations learn is remembered: batches that memory suffices for, and what the rows take.

    Args:
        model: as for :func:`evaluate_mir`, which has the errors too.
        probe: the samples.
        adapter: of the model's family.
        config: what is measured, and with how much memory.

    Ranks: collective, the constructor and :meth:`evaluate`.
    """

    def __init__(self, model: nn.Module, probe: Probe, adapter: Adapter, config: MIRConfig) -> None:
        with distributed.fail_together():
            if not isinstance(probe, Probe):
                raise ConfigError(f"probe must be a Probe, got {type(probe).__name__}; see Probe.from_folders")
            decoder = find_decoder(model)
            rank, world = distributed.rank(), distributed.world_size()
            encoded = encode_probe(probe, adapter, rank=rank, world_size=world, batch_size=config.batch_size)
            if config.probe_loss and any(batch.text_ids is None for batch in encoded.batches):
                raise ConfigError(
                    f"probe_loss needs the ids of texts, which {type(adapter).__name__} does not tell "
                    "(AdaptedBatch.text_ids); switch it off"
                )
            counts = encoded.shard.row_counts
            expected = ExpectedRows(counts, exact=counts is not None)
            need, budget = expected.layer_bytes(decoder)[0], config.capture_budget_gb
            if budget is not None and need > budget * GB:
                raise budget_error(budget, need)
        options = {name: getattr(config, name) for name in _ALIKE_ON_RANKS}
        distributed.require_same(probe_fingerprint=encoded.fingerprint, **options)
        everyone = distributed.gather_objects((encoded.digests, encoded.pixel_digests, find_machine()))
        tokens, pixels, machines = zip(*everyone, strict=True)
        self._encoded = replace(encoded, digests=sum(tokens, ()), pixel_digests=sum(pixels, ()))  # of all ranks
        self._ranks_here = machines.count(find_machine())
        self._num_layers = len(decoder.layers)
        self._expected = expected
        self._probe, self._adapter, self._config = probe, adapter, config

    @property
    def batches(self) -> Sequence[ProbeBatch]:
        """This rank's batches, as they are cut now."""
        return self._encoded.batches

    @property
    def definition(self) -> dict[str, Any]:
        """What makes values comparable: the DEFINITION_FIELDS of a record."""
        values = (self._encoded.fingerprint, self._encoded.tokens_fingerprint, self._config.root)
        return dict(zip(DEFINITION_FIELDS, values, strict=True))

    def evaluate(self, model: nn.Module, *, optimizer: Any = None, progress: bool = True) -> MIRReport:
        """One evaluation of the model as it stands; arguments and errors as of :func:`evaluate_mir`. Collective."""
        started, config, device = time.perf_counter(), self._config, find_device(model)
        peak = PeakMemory(device)
        results: list[LayerResult] = []
        passes, on_host = 0, False
        text_loss: TextLoss | None = None
        samples: SampleRows | None = None
        hidden = not (progress and distributed.is_main())
        with _Bar(total=0, desc="MIR", unit="step", delay=_BAR_DELAY_SECONDS, disable=hidden, leave=False) as bar:
            while len(results) < self._num_layers:
                known = (self._adapter, self.batches, self._expected, config, self._ranks_here)
                passed = forward_probe(model, *known, len(results), optimizer, bar, peak)
                if isinstance(passed, OutOfMemory):
                    self._halve_batches(passed, device)
                    continue
                self._expected = passed.expected
                if not passed.layers:
                    continue  # now that it is known what they need, host memory may do
                passes += 1
                on_host = on_host or passed.on_host
                text_loss = passed.text_loss or text_loss
                samples = samples or SampleRows.gather(passed.sample_rows)
                errors = config.standard_error and config.root == "exact" and samples.num_samples > 1
                for group in passed.groups():
                    with torch.autocast(device.type, enabled=False):  # the loop's, which is for forwards
                        layers = clean_rows(passed.take(group), group.start)
                        results += solve_layers(layers, samples, group.start, config.root, errors, bar, peak)
                    del layers  # before the next rows come
        assert samples is not None
        loss = (0.0, 0) if text_loss is None else (text_loss.total, text_loss.count)
        everyone = distributed.gather_objects((time.perf_counter() - started, peak.sample(), loss))
        predicted = sum(count for _, _, (_, count) in everyone)
        per_layer = [result.distance for result in results]
        return MIRReport(
            mir=mir_from_distances(per_layer),
            per_layer=per_layer,
            root=config.root,
            seconds=everyone[0][0],
            num_samples=self._encoded.num_samples,
            num_vision_tokens=int(samples.totals(VISION).sum()),
            num_text_tokens=int(samples.totals(TEXT).sum()),
            vision_outliers=[result.vision_outliers for result in results],
            text_outliers=[result.text_outliers for result in results],
            probe_fingerprint=self._encoded.fingerprint,
            tokens_fingerprint=self._encoded.tokens_fingerprint,
            pixels_fingerprint=self._encoded.pixels_fingerprint,
            dtype=results[0].dtype,
            world_size=distributed.world_size(),
            probe_loss=math.fsum(total for _, _, (total, _) in everyone) / predicted if predicted else None,
            companions={name: [result.companions[name] for result in results] for name in COMPANIONS},
            batch_size=self._encoded.shard.batch_size,
            passes=passes,
            storage_device="host" if on_host else "device",
            peak_memory_bytes=max(extra for _, extra, _ in everyone),
            **_find_errors(results),
        )

    def _halve_batches(self, shortage: OutOfMemory, device: torch.device) -> None:
        """Cut the batches of all ranks in half from now on, or raise if they are single samples."""
        shard = self._encoded.shard
        before = min(shard.batch_size, len(shard.samples))
        if before == 1:
            distributed.sync_errors(shortage.error)
        with distributed.fail_together():
            if shortage.error is not None:
                free_memory(shortage.error, device)
                gc.collect()
            enter_phase(f"encoding the probe anew for batches of {before // 2}")
            shard = encode_shard(self._probe, self._adapter, shard.samples, before // 2)
        self._encoded = replace(self._encoded, shard=shard)
        if distributed.is_main():
            messages = "; ".join(f"rank {rank}: {each}" for rank, each in enumerate(shortage.messages) if each)
            log.warning(
                "memory ran out in a forward of the probe with batch_size=%d, now it is %d on every rank (%s)",
                *(before, before // 2, messages),
            )


def _find_errors(results: Sequence[LayerResult]) -> dict[str, Any]:
    """The fields of a report that come from the samples' influences."""
    fields: dict[str, Any] = {"mir_se": None, "per_layer_se": None, "influences": None}
    on_layers = [result.influences for result in results if result.influences is not None]
    distances = [result.distance for result in results]
    if on_layers:
        fields["per_layer_se"] = compute_standard_error(torch.stack(on_layers)).tolist()
    if on_layers and math.fsum(distances) > 0.0:  # else there is no logarithm to have an error
        on_mir = compute_mir_influences(torch.stack(on_layers), distances)
        fields["mir_se"] = compute_standard_error(on_mir).item()
        fields["influences"] = [float(f"{value:.6g}") for value in on_mir.tolist()]
    return fields
