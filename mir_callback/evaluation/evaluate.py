# SPDX-License-Identifier: Apache-2.0
"""One evaluation of MIR on a live model, on one process or on all ranks of a training run.

The steps, in :meth:`Evaluator.evaluate`: forward this rank's batches -> gather row norms -> scale and outliers ->
reduce every layer's moments to its owner (layer mod world size), which computes the distance -> broadcast its transport
maps -> influences of every rank's samples -> gather K distances and sum the influences.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mir_callback import distributed
from mir_callback.config import MIRConfig, with_options
from mir_callback.errors import ConfigError, ProbeError
from mir_callback.evaluation.forward import OutOfMemory, forward_probe
from mir_callback.evaluation.hidden_states import GB, ExpectedRows, budget_error
from mir_callback.evaluation.memory import PeakMemory, find_device, find_machine, free_memory
from mir_callback.evaluation.report import MIRReport, find_errors, find_losses
from mir_callback.evaluation.solve import LayerResult, solve_layers
from mir_callback.evaluation.token_statistics import TEXT, VISION, SampleRows, clean_rows
from mir_callback.evaluation.trial import (
    Trial,
    choose_representatives,
    find_encoding_fault,
    signature_of,
    unlike_pairs,
)
from mir_callback.metric.frechet import COMPANIONS
from mir_callback.metric.rate import mir_from_distances
from mir_callback.model.decoder import unwrap
from mir_callback.model.modality import AFTER_IMAGE
from mir_callback.model.packing import find_packed_attention
from mir_callback.model.parallelism import find_share
from mir_callback.model.sharding import is_sharded, record_gathers
from mir_callback.probe.adapters import Adapter, find_adapter
from mir_callback.probe.batches import ProbeBatch, encode_probe, encode_shards, samples_of
from mir_callback.probe.encoding import decoder_of
from mir_callback.probe.huggingface import HuggingFaceAdapter
from mir_callback.probe.probe import Probe
from mir_callback.probe.sample import Sample
from mir_callback.record import DESCRIBED_FIELDS
from mir_callback.watchdog import enter_phase

_OPTION_GROUPS = ("measure", "memory")
_ALIKE_ON_RANKS = (
    *("batch_size", "root", "standard_error", "probe_loss", "vision_gain", "capture_budget_gb"),
    *("text_positions", "text_only", "vision_ids"),
)
_BAR_DELAY_SECONDS = 3.0

log = logging.getLogger(__name__)


class _Bar(tqdm):  # type: ignore[misc]  # its types are not looked at
    """A progress bar that does not end the evaluation if stderr is a full disk or a closed pipe."""

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
    """Compute MIR of a model with its current weights. Mode, weights and random states are restored afterwards.

    Args:
        model: a vision-language model, bare or wrapped (DDP, DeepSpeed engine, PEFT).
        probe: the samples; the same on every rank.
        processor: the model's processor (with image processor and tokenizer); not needed with an adapter.
        adapter: for a family of models without one, see :class:`mir_callback.probe.adapters.Adapter`.
        batch_size: samples per forward on each rank; halved on all ranks when one runs out of memory.
        optimizer: the optimizer of a model in training. With ZeRO-3 and a bare model, gathered weights are released
            through it (or the engine); with a schedule-free optimizer, its evaluation weights are used.
        progress: show a progress bar on rank 0 if the evaluation takes more than a few seconds.
        **options: options of :class:`MIRConfig`: ``root``, ``standard_error``, ``probe_loss``, ``vision_gain``,
            ``prompt``, ``text_positions``, ``text_only``, and ``capture_budget_gb``, the device memory for token rows.
            Rows beyond it are kept in pinned host memory, and layers that do not fit there either are measured in a
            further pass over the probe.

    Returns:
        The report, the same on every rank.

    Raises:
        ConfigError, ProbeError: an invalid argument or sample; before any forward.
        UnsupportedModelError: MIR cannot be measured on this model; before any forward, or after the first.
        ForwardError: the model's own forward failed on the probe.
        NumericsError: hidden states that are not finite, or too few tokens.
        Every rank raises if one does.

    Ranks: collective. Every rank must call it with the same probe and options.
    Source: arXiv:2410.07167, section 3.

    Example::

        probe = Probe.from_folders(images="textvqa/val", texts="cnn/stories", num_samples=100)
        report = evaluate_mir(model, probe, processor=AutoProcessor.from_pretrained("llava-hf/llava-1.5-7b-hf"))
        print(report.mir, report.per_layer)
    """
    with distributed.fail_together():
        if not isinstance(model, nn.Module):
            raise ConfigError(f"model must be a torch module, got {type(model).__name__}. Pass e.g. trainer.model.")
        config = MIRConfig.from_options({"batch_size": batch_size, **options}, _OPTION_GROUPS)
        adapter = find_adapter(model, processor, adapter=adapter, **config.encoding)
    return Evaluator(model, probe, adapter, config).evaluate(model, optimizer=optimizer, progress=progress)


with_options(evaluate_mir, _OPTION_GROUPS)


class Evaluator:
    """Evaluates one model on one probe, repeatedly while it trains.

    The constructor encodes the probe and raises, on all ranks, every error that can be found without a forward. The
    batch size that fits in memory, and the memory that token rows need, are kept from one evaluation to the next.

    Args:
        model: as for :func:`evaluate_mir`; errors are the same too.
        probe: the samples.
        adapter: the adapter of the model's family.
        config: the options.

    Ranks: collective, the constructor and :meth:`evaluate`.
    """

    def __init__(self, model: nn.Module, probe: Probe, adapter: Adapter, config: MIRConfig) -> None:
        with distributed.fail_together():
            if not isinstance(probe, Probe):
                raise ConfigError(
                    f"probe must be a Probe, got {type(probe).__name__}. Probe.load(path) reads a saved one."
                )
            if config.vision_gain and not probe.matched:
                raise ConfigError(
                    "vision_gain needs texts that belong to their images, and the probe does not say that they do "
                    "(Probe.matched). Probe.from_llava_json, Probe.from_dataset without texts=, and "
                    "Probe.from_pairs(..., matched=True) give such a probe; else set vision_gain=False."
                )
            for name, default in (("text_positions", AFTER_IMAGE), ("vision_ids", None)):
                asked, done = getattr(config, name), getattr(adapter, name, default)
                if asked != done:
                    raise ConfigError(
                        f"{name}={asked!r}: {type(adapter).__name__} has {done!r} and knows no other. Leave the "
                        "option out, or use another adapter."
                    )
        self._share = find_share(model)
        with distributed.fail_together():
            decoder = decoder_of(model, adapter)
            packed = find_packed_attention(decoder)
            if packed is not None and config.batch_size > 1:
                config = replace(config, batch_size=1)
                if distributed.is_main():
                    log.warning("Attention is that of %s: the probe is forwarded one sample at a time.", packed)
            encode = partial(encode_probe, probe, adapter, share=self._share, other_images=config.vision_gain)
            encode = partial(encode, text_only=config.text_only)
            fault = None
            try:
                encoded = encode(batch_size=config.batch_size)
            except ProbeError as error:
                if config.batch_size == 1:
                    raise
                encoded, fault = encode(batch_size=1), str(error)
            if config.num_losses and any(batch.text_ids is None for batch in encoded.batches):
                option = "vision_gain" if config.vision_gain else "probe_loss"
                raise ConfigError(
                    f"{option} needs the token ids of the texts (AdaptedBatch.text_ids), which "
                    f"{type(adapter).__name__} does not return for {type(unwrap(model)).__name__}. Set {option}=False."
                )
            _require_known_tokens(model, encoded.batches)
            counts = encoded.shard.row_counts
            expected = ExpectedRows(counts, exact=counts is not None)
            need, budget = expected.layer_bytes(decoder)[0], config.capture_budget_gb
            if budget is not None and need > budget * GB:
                raise budget_error(budget, need)
        options = {name: getattr(config, name) for name in _ALIKE_ON_RANKS}
        self._prompt: str | None = getattr(adapter, "prompt", None)
        attention = None if packed is None else packed.name
        distributed.require_same(
            probe_fingerprint=encoded.fingerprint, prompt=self._prompt, attention=attention, **options
        )
        own = (encoded.digests, encoded.pixel_digests, find_machine(), encoded.shard.sizes)
        tokens, pixels, machines, sizes = zip(*distributed.gather_objects(own), strict=True)
        self._encoded = replace(encoded, digests=sum(tokens, ()), pixel_digests=sum(pixels, ()))  # of all ranks
        self._ranks_here = machines.count(find_machine())
        left_out = len(probe) - encoded.num_samples
        if left_out and distributed.is_main():
            log.info("%d of the probe's %d samples have no image and are not measured", left_out, len(probe))
        self._num_layers = len(decoder.layers)
        self._expected = expected
        self._probe, self._adapter, self._config = probe, adapter, config
        with distributed.fail_together():
            example = None
            first = next((sample for sample in probe.samples if sample.has_vision), None)
            if isinstance(adapter, HuggingFaceAdapter) and first is not None and distributed.is_main():
                example = adapter.describe(first, probe.max_text_tokens)
        self.first_sample: str | None = distributed.broadcast_object(example)
        self._sizes: list[tuple[int, int, int]] = sum(sizes, [])  # of the samples of all ranks, see RankShard.sizes
        self._tried = self._everywhere = False
        self._find_encoding_fault(fault)

    @property
    def batches(self) -> Sequence[ProbeBatch]:
        """This rank's batches, of the current batch size."""
        return self._encoded.batches

    @property
    def definition(self) -> dict[str, Any]:
        """The DESCRIBED_FIELDS of a record, which are equal for comparable values; no prompt if it is not known."""
        encoded, config = self._encoded, self._config
        values = {
            "probe_fingerprint": encoded.fingerprint,
            "prompt": self._prompt,
            "tokens_fingerprint": encoded.tokens_fingerprint,
            "root": config.root,
            "text_positions": config.text_positions,
            "text_only": config.text_only,
            "vision_ids": config.vision_ids or "",
        }
        return {name: values[name] for name in DESCRIBED_FIELDS if values[name] is not None}

    def evaluate(self, model: nn.Module, *, optimizer: Any = None, progress: bool = True) -> MIRReport:
        """Evaluate the current weights; arguments and errors as of :func:`evaluate_mir`. Ranks: collective."""
        started, config, device = time.perf_counter(), self._config, find_device(model)
        share = find_share(model)
        with distributed.fail_together():
            if share != self._share:
                raise ConfigError(
                    f"The model was split over ranks after the probe was encoded for it: this rank's part of the "
                    f"samples was {self._share.part + 1} of {self._share.parts} and is {share.part + 1} of "
                    f"{share.parts}. Split it first (parallelize_module, deepspeed.initialize), then make the monitor."
                )
        peak = PeakMemory(device)
        results: list[LayerResult] = []
        passes, on_host = 0, False
        losses: tuple[Tensor, ...] = ()
        samples: SampleRows | None = None
        hidden = not (progress and distributed.is_main())
        self._try_samples(model, optimizer, peak)
        with _Bar(total=0, desc="MIR", unit="step", delay=_BAR_DELAY_SECONDS, disable=hidden, leave=False) as bar:
            while len(results) < self._num_layers:
                batches = self.batches, self._encoded.other_images.batches if self._encoded.other_images else ()
                known = (self._adapter, *batches, self._expected, config, self._ranks_here)
                gathers = self._gathers(model)
                with record_gathers(model) if gathers else nullcontext() as calls:
                    passed = forward_probe(model, *known, len(results), optimizer, bar, peak)
                if isinstance(passed, OutOfMemory):
                    self._halve_batches(passed, device)
                    continue
                if gathers and len(set(distributed.gather_objects(repr(calls)))) > 1:
                    del passed  # its rows may be of weights that no rank has sent
                    self._forward_everywhere("Ranks called modules whose weights they gather unequally")
                    continue
                self._expected = passed.expected
                if not passed.layers:
                    continue  # again: now their size is known, and they may fit in host memory
                passes += 1
                on_host = on_host or passed.on_host
                losses = passed.losses or losses
                samples = samples or SampleRows.gather(passed.sample_rows, self._encoded.shard.kept)
                errors = config.standard_error and config.root == "exact" and samples.num_samples > 1
                for group in passed.groups():
                    with torch.autocast(device.type, enabled=False):  # the training loop's is meant for forwards
                        layers = clean_rows(passed.take(group), samples, group.start, errors)
                        results += solve_layers(layers, samples, group.start, config.root, errors, bar, peak)
                    del layers  # before the next rows come
        assert samples is not None
        own_losses = [each.tolist() for each in losses]
        everyone = distributed.gather_objects((time.perf_counter() - started, peak.sample(), own_losses))
        text_losses = [
            samples.in_probe_order([torch.tensor(part, dtype=torch.float64).reshape(-1, 2) for part in of_ranks])
            for of_ranks in zip(*(found for _, _, found in everyone), strict=True)
        ]
        per_layer = [result.distance for result in results]
        companions = {name: [result.companions[name] for result in results] for name in COMPANIONS}
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
            text_positions=config.text_positions,
            vision_ids=config.vision_ids,
            first_sample=self.first_sample,
            text_only=config.text_only,
            prompt=self._prompt,
            tokens_fingerprint=self._encoded.tokens_fingerprint,
            pixels_fingerprint=self._encoded.pixels_fingerprint,
            dtype=results[0].dtype,
            world_size=distributed.world_size(),
            scale_free_mir=mir_from_distances(companions["scale_free"]),
            companions=companions,
            batch_size=self._encoded.shard.batch_size,
            passes=passes,
            storage_device="host" if on_host else "device",
            peak_memory_bytes=max(extra for _, extra, _ in everyone),
            **find_errors(results),
            **find_losses(text_losses),
        )

    def _find_encoding_fault(self, fault: str | None) -> None:
        """Encode one sample at a time if the adapter can't encode them in batches; ``fault`` is this rank's."""
        pairs = unlike_pairs(self._encoded.samples, self._sizes)
        with distributed.fail_together():
            for pair in pairs if self._in_batches else ():
                fault = fault or find_encoding_fault(pair, self._probe.max_text_tokens, self._adapter)
        found = next(filter(None, distributed.gather_objects(fault)), None)
        if found is not None:
            self._encode_one_by_one(found)

    @property
    def _in_batches(self) -> bool:
        return self._encoded.shard.batch_size > 1 and len(self._encoded.shard.samples) > 1

    def _try_samples(self, model: nn.Module, optimizer: Any, peak: PeakMemory) -> None:
        """Before the first evaluation: find out what samples of a batch, and ranks that gather weights, need."""
        if self._tried:
            return
        with _Bar(total=0, disable=True) as bar:
            cut, config = self._probe.max_text_tokens, self._config
            trial = Trial(model, cut, self._adapter, config, self._ranks_here, optimizer, bar, peak)
            for pair in unlike_pairs(self._encoded.samples, self._sizes):
                fault = trial.find_forward_fault(pair) if self._in_batches else None
                while isinstance(fault, OutOfMemory):
                    self._halve_batches(fault, find_device(model))
                    fault = trial.find_forward_fault(pair) if self._in_batches else None
                if fault is not None:
                    self._encode_one_by_one(fault)
            for alike in self._find_representatives() if self._gathers(model) else ():
                unlike = trial.find_unlike_calls(alike)
                if unlike is not None:
                    self._forward_everywhere(unlike)
                    break
        self._tried = True

    def _gathers(self, model: nn.Module) -> bool:
        """Whether ranks with samples of their own gather weights together."""
        return is_sharded(model) and self._share.parts > 1 and not self._everywhere

    def _find_representatives(self) -> list[list[Sample]]:
        samples, cut = self._encoded.samples, self._probe.max_text_tokens
        with distributed.fail_together():
            own = {at: signature_of(self._adapter.encode([samples[at]], cut).inputs) for at in self._encoded.shard.kept}
        signatures = {at: found for part in distributed.gather_objects(own) for at, found in part.items()}
        of_all = [(index, signatures[index], tokens) for index, _, tokens in self._sizes]
        return choose_representatives(samples, of_all)

    def _forward_everywhere(self, why: str) -> None:
        """From now on forward the whole probe on every rank, each of which still keeps the rows of its own samples."""
        self._everywhere = True
        self._encode_anew(
            self._encoded.shard.batch_size, samples_of(self._share, self._encoded.samples, everywhere=True)
        )
        if distributed.is_main():
            log.warning(
                "%s. So that ranks don't wait for one another, each forwards the whole probe from now on: an "
                "evaluation takes up to %d times as long.",
                *(why, self._share.parts),
            )

    def _encode_one_by_one(self, fault: str) -> None:
        if self._encoded.shard.batch_size > 1:
            self._encode_anew(1)
        if distributed.is_main():
            log.info("NOTE: one sample of the probe per forward, as samples in a batch change one another: %s", fault)

    def _encode_anew(self, batch_size: int, chosen: Sequence[tuple[int, bool]] | None = None) -> None:
        enter_phase(f"encoding the probe in batches of {batch_size}")
        with distributed.fail_together():
            samples, cut = self._encoded.samples, self._probe.max_text_tokens
            known = (samples, cut, self._adapter, chosen or self._encoded.shard.samples, batch_size)
            shard, others = encode_shards(*known, other_images=self._config.vision_gain)
        self._encoded = replace(self._encoded, shard=shard, other_images=others)
        if self._expected.exact:
            self._expected = replace(self._expected, counts=shard.row_counts)  # others, if batches were wrong

    def _halve_batches(self, shortage: OutOfMemory, device: torch.device) -> None:
        """Halve the batch size on all ranks, or raise if it is 1."""
        shard = self._encoded.shard
        before = min(shard.batch_size, len(shard.samples))
        if before == 1:
            distributed.sync_errors(shortage.error)
        with distributed.fail_together():
            if shortage.error is not None:
                free_memory(shortage.error, device)
                gc.collect()
        self._encode_anew(before // 2)
        if distributed.is_main():
            messages = "; ".join(f"rank {rank}: {each}" for rank, each in enumerate(shortage.messages) if each)
            log.warning(
                "Out of memory in a forward of the probe with batch_size=%d; going on with batch_size=%d on every rank "
                "(%s)",
                *(before, before // 2, messages),
            )


def _require_known_tokens(model: nn.Module, batches: Sequence[ProbeBatch]) -> None:
    """Refuse token ids beyond the model's vocabulary, which on a GPU would crash the process.

    Those of images may lie beyond it: some families replace them before they look tokens up.
    """
    weight: Any = getattr(getattr(unwrap(model), "get_input_embeddings", lambda: None)(), "weight", None)
    shape: Sequence[int] = getattr(weight, "ds_shape", getattr(weight, "shape", ()))  # of ZeRO-3 the whole one
    for batch in batches if len(shape) == 2 and shape[0] else ():
        ids = batch.inputs.get("input_ids")
        if not isinstance(ids, Tensor):
            continue
        text = ids if batch.masks is None else ids[~batch.masks.vision]
        if text.numel() and int(text.max()) >= shape[0]:
            raise ConfigError(
                f"The processor is not the model's: it gives token id {int(text.max())} for {', '.join(batch.names)}, "
                f"and the vocabulary has {shape[0]}. Pass the model's own (processor=, --processor FOLDER_OR_HUB_NAME)."
            )
