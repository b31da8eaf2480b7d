# SPDX-License-Identifier: Apache-2.0
"""This rank's forwards over its share of a probe, on a model that is left as it stood."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mir_callback import distributed as collectives
from mir_callback.evaluation.hidden_states import Stash, device_of, need_of, prepared, spare_of
from mir_callback.evaluation.memory import Place, is_out_of_memory, let_go, too_small
from mir_callback.model.capture import HiddenStateCapture
from mir_callback.model.decoder import find_decoder, unwrap
from mir_callback.model.isolation import evaluation_weights, release_leftovers, undisturbed
from mir_callback.model.text_loss import TextLoss
from mir_callback.probe.adapters import Adapter
from mir_callback.probe.batches import EncodedProbe
from mir_callback.watchdog import Tell


@dataclass(frozen=True)
class Observation:
    """What this rank's forwards showed of some layers.

    Attributes:
        first: index of the first of these layers.
        rows: per layer the vision rows (r, d) and text rows (s, d), in the dtype of the hidden states. Emptied when
            the next layers are asked for.
        sample_rows: (n, 2) int64 on the CPU, how many vision and text rows each of this rank's samples has; the rows
            lie in that order, the samples in the order of `share_of_rank`.
        passes: how often the probe has been forwarded so far.
        final: whether no forward follows for further layers, so that the model may change.
        place: where rows waited so far, "host" if those of any rank and layer did.
        text_loss: this rank's, from the first pass; None if not asked for.
    """

    first: int
    rows: list[tuple[Tensor, Tensor]]
    sample_rows: Tensor
    passes: int
    final: bool
    place: Place
    text_loss: TextLoss | None


@dataclass(frozen=True)
class _Job:
    """What is the same for every pass of an evaluation."""

    model: nn.Module
    encoded: EncodedProbe
    adapter: Adapter
    optimizer: Any
    probe_loss: bool
    bar: tqdm
    tell: Tell
    look: Callable[[], None]


@dataclass(frozen=True)
class _Outcome:
    """What every rank tells of its pass.

    Attributes:
        shortage: what ran out of memory, or None.
        stop: index behind the last layer kept.
        at_once: layers it can have on its device at a time.
        need: bytes of one layer.
        place: where rows are.
        informed: whether the pass was planned by what it needs.
    """

    shortage: str | None = None
    stop: int = 0
    at_once: int = 0
    need: int = 0
    place: Place = "device"
    informed: bool = True


@dataclass(frozen=True)
class _Seen:
    """What one pass showed this rank, and the number of layers of the model."""

    total: int
    stash: Stash
    sample_rows: Tensor
    text_loss: TextLoss | None
    outcome: _Outcome


def observe(
    model: nn.Module,
    encoded: EncodedProbe,
    adapter: Adapter,
    optimizer: Any,
    probe_loss: bool,
    bar: tqdm,
    tell: Tell,
    look: Callable[[], None] = lambda: None,
) -> Iterator[Observation]:
    """Forward this rank's share of a probe and hand out its rows, some layers at a time, all at once if they fit.

    Rows that do not fit on the device wait in host memory, and if they fit neither there, the probe is forwarded
    several times. A forward that runs out of memory on any rank is repeated on all with half the batch. Any other
    failure on one rank becomes one on all.

    Under ZeRO-3 the forwards wait for other ranks themselves: there the others hear of a failure of this one's forward
    only when they get out of theirs, which may be never, and ``tell`` says so. Keeping rows never fails in a forward.

    Args:
        model: as it stands.
        encoded: the probe.
        adapter: with which it was encoded.
        optimizer: the run's, or None.
        probe_loss: sum the loss on the probe's texts as well.
        bar: told of every batch.
        tell: told of every phase.
        look: called when memory is likely to be at its highest.

    Raises:
        ConfigError: the budget is too small for one layer; on every rank.

    Ranks: collective.
    """
    job = _Job(model, encoded, adapter, optimizer, probe_loss, bar, tell, look)
    start = passes = 0
    total = 1  # until a pass has seen the model
    place: Place = "device"
    while start < total:
        done = _agreed(job, start, *_forwarded(job, start))
        if done is None:
            continue
        seen, agreed = done
        passes += 1
        place = "host" if agreed.place == "host" else place
        for first in range(start, agreed.stop, agreed.at_once):
            layers = range(first, min(first + agreed.at_once, agreed.stop))
            rows = _rows_of(seen.stash, layers, agreed.place)
            final = agreed.stop == seen.total
            yield Observation(first, rows, seen.sample_rows, passes, final, place, seen.text_loss)
            rows.clear()
        start, total = agreed.stop, seen.total


def _forwarded(job: _Job, start: int) -> tuple[_Seen | None, Exception | None]:
    """One pass of this rank, or what it failed with."""
    try:
        return _pass(job, start), None
    except Exception as error:
        job.tell(f"telling the other ranks of its failure, {collectives.describe(error)}")
        return None, error


def _agreed(job: _Job, start: int, seen: _Seen | None, error: Exception | None) -> tuple[_Seen, _Outcome] | None:
    """What all ranks make of a pass; None if it has to be done again. Collective."""
    short = is_out_of_memory(error)
    outcome = _Outcome() if seen is None else seen.outcome
    if error is not None and short:
        outcome = _Outcome(shortage=collectives.describe(error))
    everyone = collectives.settle(None if short else error, outcome)
    if any(each.shortage for each in everyone):
        _halve(job, error, [each.shortage for each in everyone])
        return None
    assert seen is not None
    stop = min(each.stop for each in everyone)
    if stop == start:
        if not all(each.informed for each in everyone):
            return None  # now that the need is known, host memory may do
        budget = job.encoded.capture_budget_gb
        assert budget is not None  # otherwise the first layer is kept whatever it takes
        raise too_small(budget, max(each.need for each in everyone))
    seen.stash.keep_until(stop)
    place: Place = "host" if any(each.place == "host" for each in everyone) else "device"
    return seen, _Outcome(None, stop, min(each.at_once for each in everyone), 0, place)


def _halve(job: _Job, error: Exception | None, shortages: list[str | None]) -> None:
    """Cut the batches of all ranks in half for this and all later evaluations, or raise if they are single samples."""
    share = job.encoded.share
    before = min(share.batch_size, len(share.samples))
    if before == 1:
        collectives.agree(error)
    told = "; ".join(f"rank {rank}: {words}" for rank, words in enumerate(shortages) if words)
    with collectives.all_or_none():
        if error is not None:
            let_go(error, device_of(job.model))
            gc.collect()
        job.tell(f"encoding the probe anew for batches of {before // 2}")
        share.cut(job.adapter, before // 2)
    if collectives.is_main():
        warnings.warn(
            f"memory ran out in a forward of the probe with batch_size={before}, now it is {before // 2} on every "
            f"rank ({told})",
            stacklevel=2,
        )


def _pass(job: _Job, start: int) -> _Seen:
    """Every batch of this rank through the model once. Ranks: each for itself, but for what the forward does."""
    job.tell("looking at the model")
    decoder = find_decoder(job.model)
    release_leftovers(job.model, job.model, job.optimizer)
    plan, stash = prepared(job.model, decoder, job.encoded, start)
    share = job.encoded.share
    informed = share.rows is not None and share.dtype is not None
    job.bar.total = job.bar.n + len(share.batches) + len(decoder.layers) - start
    text_loss = TextLoss() if job.probe_loss and start == 0 else None
    with (
        evaluation_weights(job.model, job.optimizer),
        undisturbed(job.model, job.model, job.optimizer),
        HiddenStateCapture(decoder, stash, job.look, text_loss) as capture,
    ):
        _forward_all(job, capture)
    stash.settle()
    sample_rows = torch.cat(capture.sample_rows)
    vision, text = (int(count) for count in sample_rows.sum(dim=0))
    share.rows, share.dtype = (vision, text), stash.dtype
    if plan.place == "host":
        share.pinned = max(share.pinned, stash.held_bytes)
    need = need_of(share, decoder)
    assert need is not None  # the rows are known now
    stop = start + len(stash.kept)
    outcome = _Outcome(None, stop, plan.at_once, (1 + spare_of(share)) * need[0], plan.place, informed)
    return _Seen(len(decoder.layers), stash, sample_rows, text_loss, outcome)


def _rows_of(stash: Stash, layers: range, place: Place) -> list[tuple[Tensor, Tensor]]:
    """Rows of layers on the device; from host memory that may fail, and then does on all ranks. Collective."""
    with collectives.all_or_none() if place == "host" else nullcontext():
        return [stash.take(layer) for layer in layers]


def _forward_all(job: _Job, capture: HiddenStateCapture) -> None:
    """Every batch of this rank through the model."""
    anchor = next(p for p in job.model.parameters() if p.is_floating_point())
    batches = job.encoded.batches
    with job.adapter.live_masks(unwrap(job.model)) as live:
        for number, batch in enumerate(batches, start=1):
            job.tell(f"forward of batch {number} of {len(batches)}")
            placed = batch.on(anchor.device, anchor.dtype)
            masks = placed.masks or live
            assert masks is not None  # an adapter knows its masks before or during the forward
            try:
                capture.forward(job.model, placed.inputs, masks, placed.keep, placed.text_ids or ())
            except Exception as error:
                job.tell(f"leaving its forward of batch {number} after {collectives.describe(error)}")
                raise
            job.bar.update()
    job.tell("waiting until every rank has done its forwards")
