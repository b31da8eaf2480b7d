# SPDX-License-Identifier: Apache-2.0
"""One pass over the probe: this rank's forwards, after which the model is in its old state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mir_callback import distributed
from mir_callback.config import MIRConfig
from mir_callback.errors import ForwardError, MIRError, ProbeError, UnsupportedModelError
from mir_callback.evaluation.hidden_states import ExpectedRows, HiddenStateStore, budget_error, open_store
from mir_callback.evaluation.memory import PeakMemory, find_device, is_out_of_memory
from mir_callback.model.capture import HiddenStateCapture, TextLoss, lean_outputs
from mir_callback.model.decoder import Decoder, unwrap
from mir_callback.model.isolation import evaluation_weights, preserve_training_state
from mir_callback.model.packing import INSTEAD, PackedAttention, check_one_sequence, find_packed_attention, one_sequence
from mir_callback.model.parallelism import find_groups, whole_sequences
from mir_callback.model.sharding import is_sharded, release_leftovers
from mir_callback.probe.batches import ProbeBatch
from mir_callback.probe.encoding import Adapter, decoder_of
from mir_callback.watchdog import enter_phase


@dataclass(frozen=True)
class ProbePass:
    """The result of one pass over the probe on this rank."""

    layers: range  # layers whose rows every rank has kept
    at_once: int  # how many of them fit on every rank's device at a time
    on_host: bool  # whether any rank keeps rows in host memory
    store: HiddenStateStore  # this rank's rows
    sample_rows: Tensor  # (n, 2) int64 on the CPU, number of vision and text rows of each of this rank's samples
    losses: tuple[Tensor, ...]  # this rank's in the first pass, with the right and with other images; see TextLoss
    expected: ExpectedRows  # sizes for a further pass

    def groups(self) -> Iterator[range]:
        """The layers in groups that fit on the device."""
        for start in range(self.layers.start, self.layers.stop, max(1, self.at_once)):
            yield range(start, min(start + self.at_once, self.layers.stop))

    def take(self, group: range) -> list[tuple[Tensor, Tensor]]:
        """Vision rows (r, d) and text rows (s, d) of layers, on the device; the store frees them. Ranks: collective."""
        with distributed.fail_together() if self.on_host else nullcontext():
            return [self.store.take(layer) for layer in group]


@dataclass(frozen=True)
class OutOfMemory:
    """The result of a pass in which a rank ran out of memory."""

    error: Exception | None  # this rank's, if it ran out
    messages: list[str | None]  # of each rank


@dataclass(frozen=True)
class _Outcome:
    """What the ranks exchange after a pass."""

    out_of_memory: str | None = None  # the error's message
    stop: int = 0  # index after the last layer kept
    at_once: int = 0
    on_host: bool = False
    need: int = 0  # bytes of one layer
    planned: bool = True  # whether that was known before the pass


def forward_probe(
    model: nn.Module,
    adapter: Adapter,
    batches: Sequence[ProbeBatch],
    with_other_images: Sequence[ProbeBatch],
    expected: ExpectedRows,
    config: MIRConfig,
    ranks_here: int,
    first: int,
    optimizer: Any,
    bar: tqdm,
    peak: PeakMemory,
) -> ProbePass | OutOfMemory:
    """Forward this rank's batches, and keep the rows of as many layers from ``first`` on as fit on every rank.

    In the first pass the losses that the config asks for are measured too, those ``with_other_images`` in forwards of
    their own, after the others.

    A ProbePass without layers means that not even one fitted because its size was not known before; now it is.
    Raises on every rank: ConfigError for a budget too small for one layer, ForwardError if the model's forward failed
    on any rank for another reason than memory. Keeping rows never fails inside a forward. Ranks: collective.

    Under ZeRO-3 and FSDP the forwards themselves wait for other ranks. If one rank's forward fails there, the others
    can't be called out of theirs; the watchdog reports the failure on all of them within seconds.
    """
    error: Exception | None = None
    outcome = _Outcome()
    channel = distributed.SideChannel()
    find_failure = channel.read_failure if waits_for_ranks(model) else None
    try:
        enter_phase("finding the decoder layers")
        decoder = decoder_of(model, adapter)
        release_leftovers(model, model, optimizer)  # before free memory is measured
        text_losses = [TextLoss() for _ in range(config.num_losses)] if first == 0 else []
        runs = [(batches, ""), (with_other_images, " with other images")][: max(1, len(text_losses))]
        bar.total = bar.n + sum(len(part) for part, _ in runs) + len(decoder.layers) - first
        store, at_once = open_store(decoder, first, expected, config.capture_budget_gb, ranks_here)

        def keep_rows(layer: int, state: Tensor, positions: tuple[Tensor, ...]) -> None:
            peak.sample()
            store.append(layer, state, positions)

        codes = has_image_codes(adapter, batches)
        capture = HiddenStateCapture(decoder, keep_rows, text_losses[0] if text_losses else None, image_codes=codes)
        live = evaluation_weights(model, optimizer), preserve_training_state(model, model, optimizer)
        packed = find_packed_attention(decoder)
        with live[0], live[1], one_sequence(decoder, packed):
            if packed is not None and first == 0:
                enter_phase(f"trying the attention of {packed}", find_failure)
                _check_attention(model, adapter, batches[0], decoder, packed)
            with capture:
                for number, (part, which) in enumerate(runs):
                    if number:
                        capture.only_loss(text_losses[number])
                    _forward_batches(model, adapter, part, capture, bar, which, channel, find_failure)
        store.finish()
        losses = tuple(torch.cat(each.samples) for each in text_losses)
        _require_same_tokens(batches, losses)
        sample_rows = torch.cat(capture.sample_rows)
        planned = expected.counts is not None and expected.dtype is not None
        expected = expected.after_pass(store, sample_rows)
        need = (1 + expected.spare_layers) * expected.layer_bytes(decoder)[0]
        outcome = _Outcome(None, first + len(store.kept), at_once, store.on_host, need, planned)
    except Exception as caught:
        channel.post_failure(caught)
        enter_phase(f"reporting its failure to the other ranks: {distributed.describe(caught)}", find_failure)
        error = caught
    channel.leave(wait=error is not None)
    short = is_out_of_memory(error)
    if error is not None and short:
        outcome = _Outcome(out_of_memory=distributed.describe(error))
    everyone = distributed.sync_errors(None if short else error, outcome)
    if any(each.out_of_memory for each in everyone):
        return OutOfMemory(error, [each.out_of_memory for each in everyone])
    stop, at_once = min(each.stop for each in everyone), min(each.at_once for each in everyone)
    if stop == first and config.capture_budget_gb is not None and all(each.planned for each in everyone):
        raise budget_error(config.capture_budget_gb, max(each.need for each in everyone))
    store.drop_from(stop)
    on_host = any(each.on_host for each in everyone)
    return ProbePass(range(first, stop), at_once, on_host, store, sample_rows, losses, expected)


def _forward_batches(
    model: nn.Module,
    adapter: Adapter,
    batches: Sequence[ProbeBatch],
    capture: HiddenStateCapture,
    bar: tqdm,
    which: str,
    channel: distributed.SideChannel,
    find_failure: Callable[[], str | None] | None,
) -> None:
    # Inside: it puts hooks back that an adapter may take off the model.
    with adapter.live_masks(unwrap(model)) as live, whole_sequences(model):
        for number, batch in enumerate(batches, start=1):
            enter_phase(f"forward of batch {number} of {len(batches)}{which}", find_failure)
            ready = placed(model, batch)
            masks = ready.masks or live
            assert masks is not None  # an adapter knows its masks before or during the forward
            try:
                capture.forward(model, ready.inputs, masks, ready.keep, ready.text_ids or ())
            except Exception as error:
                channel.post_failure(error)
                enter_phase(f"leaving its forward of batch {number} after {distributed.describe(error)}", find_failure)
                if isinstance(error, MIRError) or is_out_of_memory(error):
                    raise
                raise ForwardError(
                    f"MIR could not be evaluated: the model's own forward failed on probe samples "
                    f"{', '.join(batch.names)}: {distributed.describe(error)}. If the model works in training, check "
                    "that the processor belongs to it, or what its adapter's encode returns."
                ) from error
            bar.update()
    enter_phase("waiting for the other ranks' forwards")


def _check_attention(
    model: nn.Module, adapter: Adapter, batch: ProbeBatch, decoder: Decoder, packed: PackedAttention
) -> None:
    if len(batch.names) > 1:
        raise UnsupportedModelError(
            f"The attention of the model was replaced by {packed} after the probe was encoded for it. Replace it "
            "first, then make the monitor."
        )
    inputs = {**placed(model, batch).inputs, **lean_outputs(decoder.model, few_logits=True)}
    try:
        with adapter.live_masks(unwrap(model)), whole_sequences(model):
            check_one_sequence(packed, decoder, lambda: distributed.finish(model(**inputs)))
    except Exception as error:
        if isinstance(error, MIRError) or is_out_of_memory(error):
            raise
        raise UnsupportedModelError(
            f"MIR can't be measured with the attention of {packed}, which fails on the probe sample "
            f"{batch.names[0]} alone, without padding: {distributed.describe(error)}. {INSTEAD}"
        ) from error


def placed(model: nn.Module, batch: ProbeBatch) -> ProbeBatch:
    """The batch on the model's device, floating inputs in the dtype of its weights. Ranks: pure."""
    return batch.on(find_device(model), next(p.dtype for p in model.parameters() if p.is_floating_point()))


def has_image_codes(adapter: Adapter, batches: Sequence[ProbeBatch]) -> bool:
    """Whether images are tokens of the vocabulary: vision ids were given, and several of them occur. Ranks: pure."""
    if getattr(adapter, "vision_ids", None) is None:
        return False
    seen = [batch.inputs["input_ids"][batch.masks.vision] for batch in batches if batch.masks is not None]
    return len(torch.cat(seen).unique()) > 1 if seen else False


def waits_for_ranks(model: nn.Module) -> bool:
    """Whether forwards wait for other ranks: sharded weights, tensor parallelism of any kind, DDP."""
    is_ddp = any(kind.__name__ == "DistributedDataParallel" for each in model.modules() for kind in type(each).__mro__)
    return is_ddp or is_sharded(model) or bool(find_groups(model).model)


def _require_same_tokens(batches: Sequence[ProbeBatch], losses: Sequence[Tensor]) -> None:
    """ProbeError if a sample has fewer predicted tokens with one image than with another, as its text was cut."""
    if len(losses) < 2:
        return
    names = [name for batch in batches for name, keep in zip(batch.names, batch.keep.tolist(), strict=True) if keep]
    for name, *counts in zip(names, *(each[:, 1].long().tolist() for each in losses), strict=True):
        if counts[0] != counts[1]:
            raise ProbeError(
                f"vision_gain needs the same text with both images, but the model predicts {counts[0]} tokens of {name}"
                f" with its own image and {counts[1]} with another: it cuts what is too long. Build the probe with "
                "fewer max_text_tokens."
            )
