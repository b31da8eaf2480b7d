# SPDX-License-Identifier: Apache-2.0
"""Storage of token rows from the forwards to the solves: on the device, in host memory, or in several passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from mir_callback import distributed
from mir_callback.errors import ConfigError
from mir_callback.evaluation.memory import find_device, free_memory, free_on_device, free_on_host, is_out_of_memory
from mir_callback.model.decoder import Decoder

GB = 10**9
_FREE_SHARE = 0.5  # of the free memory: forwards and solves need some too


@dataclass(frozen=True)
class Budgets:
    """Memory for this rank's rows, in bytes."""

    device: float  # on the model's device
    host: float  # in host memory in addition; 0 if that is the model's device
    given: bool  # whether the user set capture_budget_gb, which not even one layer may exceed


@dataclass(frozen=True)
class StoragePlan:
    """How many layers one pass over the probe keeps, and where."""

    on_host: bool  # whether rows are kept in host memory between forwards and solves, else on the device
    count: int  # layers kept; 0 if not even one fits
    at_once: int  # layers on the device at a time in the solves


@dataclass(frozen=True)
class ExpectedRows:
    """Number and size of the rows that a rank's samples have in each layer, as far as known."""

    counts: tuple[int, int] | None  # vision and text rows, or None if only a forward shows them
    exact: bool  # whether the batches show them, so that memory for all rows can be allocated at once
    dtype: torch.dtype | None = None  # of the hidden states, after the first forward
    pinned_bytes: int = 0  # host memory that torch's allocator keeps from an earlier evaluation

    @property
    def spare_layers(self) -> int:
        """Layers for which extra memory is needed to concatenate rows: none if their number was known before."""
        return 0 if self.exact else 1

    def layer_bytes(self, decoder: Decoder) -> tuple[int, int]:
        """Bytes of one layer on the device and in host memory; (0, 0) before a forward if only that shows them."""
        if self.counts is None:
            return 0, 0
        dtype = self.dtype or _embedding_dtype(decoder)
        sizes = [rows_bytes(count, decoder.hidden_size, dtype) for count in self.counts]
        # Each part is rounded up to a power of two, so to less than twice its size.
        pinned = sum(map(pinned_bytes, sizes)) if self.exact else 2 * sum(sizes)
        return sum(sizes), pinned

    def after_pass(self, store: HiddenStateStore, sample_rows: Tensor) -> ExpectedRows:
        """The values known after a pass, from its store and the number of rows of its samples, (n, 2)."""
        vision, text = (int(count) for count in sample_rows.sum(dim=0))
        pinned = max(self.pinned_bytes, store.held_bytes if store.on_host else 0)
        return ExpectedRows((vision, text), self.exact, store.dtype, pinned)


def find_budgets(device: torch.device, capture_budget_gb: float | None, ranks_here: int, pinned: int = 0) -> Budgets:
    """Memory for this rank's rows.

    Host memory is shared by the ``ranks_here`` ranks on this machine; ``pinned`` bytes of it torch has already.
    """
    host = _FREE_SHARE * free_on_host() / ranks_here
    given = capture_budget_gb is not None
    limit = capture_budget_gb * GB if capture_budget_gb is not None else None
    if device.type == "cpu":
        return Budgets(host if limit is None else limit, 0, given)
    return Budgets(_FREE_SHARE * free_on_device(device) if limit is None else limit, host + pinned, given)


def plan_pass(
    layers: int, need: float, host_need: float, budgets: Budgets, *, spare: int = 0, world: int = 1
) -> StoragePlan:
    """Where to keep rows, and of how many of the remaining layers.

    All on the device if they fit there; else in host memory; else as many as fit, evenly over several passes. Plans
    differ between ranks; the caller takes the smallest. Ranks: pure.

    Args:
        layers: number of remaining layers, at least 1.
        need: bytes of one layer's rows on the device.
        host_need: bytes of one layer's rows in host memory.
        budgets: memory of this rank.
        spare: layers for which extra memory on the device is needed while rows are concatenated.
        world: number of ranks. They solve one layer each in parallel, so multiples of it are preferred.
    """
    least = 0 if budgets.given else 1
    fitting = max(_how_many(budgets.device, need, layers + spare) - spare, least)
    if fitting >= layers:
        return StoragePlan(False, layers, layers)
    at_once = max(_how_many(budgets.device, need, layers), least)  # rows from the host need no extra memory
    on_host = _how_many(budgets.host, host_need, layers) if at_once else 0
    kept = max(on_host, fitting)
    if kept == 0:
        return StoragePlan(False, 0, 0)
    passes = -(-layers // kept)
    count = -(-layers // passes)
    if on_host <= fitting:
        return StoragePlan(False, count, count)
    at_once = min(at_once, count)
    return StoragePlan(True, count, at_once - at_once % world if at_once > world else at_once)


def open_store(
    decoder: Decoder, first: int, expected: ExpectedRows, capture_budget_gb: float | None, ranks_here: int
) -> tuple[HiddenStateStore, int]:
    """A store for this rank's rows of layers from ``first`` on, and how many layers fit on the device afterwards."""
    layers = range(first, len(decoder.layers))
    budgets = find_budgets(find_device(decoder.model), capture_budget_gb, ranks_here, expected.pinned_bytes)
    plan = StoragePlan(False, len(layers), len(layers))
    if expected.counts is not None:
        need, spare = expected.layer_bytes(decoder), expected.spare_layers
        plan = plan_pass(len(layers), *need, budgets, spare=spare, world=distributed.world_size())
    store = HiddenStateStore(
        layers[: plan.count],
        limit=budgets.host if plan.on_host else budgets.device,
        keep_first=not budgets.given,
        capacity=expected.counts if expected.exact else None,
        on_host=plan.on_host,
    )
    return store, plan.at_once


def budget_error(capture_budget_gb: float, need: float) -> ConfigError:
    """The error for a budget smaller than one layer; ``need`` in bytes."""
    unit = 10.0 ** (math.floor(math.log10(need / GB)) - 1)
    enough = math.ceil(need / GB / unit * (1 - 1e-12)) * unit  # two digits, never below it
    return ConfigError(
        f"capture_budget_gb={capture_budget_gb:g} is too small: the token rows of one decoder layer take "
        f"{need / GB:.3g} GB on the rank with the most. Set at least {enough:.2g}, or use fewer samples or more ranks."
    )


def rows_bytes(count: int, dim: int, dtype: torch.dtype) -> int:
    """Bytes of ``count`` rows of ``dim`` numbers. Ranks: pure."""
    return count * dim * torch.empty((), dtype=dtype).element_size()


def pinned_bytes(size: int) -> int:
    """What torch allocates for ``size`` bytes of pinned host memory: the next power of two. Ranks: pure."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


@dataclass
class _Rows:
    """Rows of one modality of one layer so far; parts are views of ``block`` if the number of rows was known before."""

    parts: list[Tensor] = field(default_factory=list)
    block: Tensor | None = None

    @property
    def filled(self) -> int:
        return sum(map(len, self.parts))


class HiddenStateStore:
    """Keeps all rows of a range of layers; if memory does not suffice, it drops the last layers. Ranks: pure.

    Args:
        layers: the layers to keep. ``kept`` are those that were not dropped.
        limit: maximum bytes, including those needed to concatenate parts.
        keep_first: keep the first layer even if it exceeds the limit.
        capacity: number of vision and text rows that each layer will have, to allocate memory once; None if unknown,
            then parts are concatenated in the end.
        on_host: keep rows in host memory, pinned if they come from a GPU.
    """

    def __init__(
        self,
        layers: range,
        *,
        limit: float = float("inf"),
        keep_first: bool = True,
        capacity: tuple[int, int] | None = None,
        on_host: bool = False,
    ) -> None:
        self.kept, self.on_host = layers, on_host
        self.dtype: torch.dtype | None = None  # of the rows, after the first append
        self._failure: Exception | None = None  # out of memory for even the first layer
        self._limit, self._keep_first, self._capacity = limit, keep_first, capacity
        self._device = torch.device("cpu")
        self._rows = {layer: (_Rows(), _Rows()) for layer in layers}
        self._bytes = dict.fromkeys(layers, 0)

    @property
    def held_bytes(self) -> int:
        """Bytes of all rows, allocated memory for further rows included."""
        return sum(self._bytes.values())

    def append(self, layer: int, state: Tensor, positions: tuple[Tensor, ...]) -> None:
        """Copy the vision and text rows of hidden states (n, d); drops the last layers if memory does not suffice."""
        self.dtype, self._device = state.dtype, state.device
        if layer not in self.kept:
            return
        more = self._bytes_to_come(layer, state, positions)
        while layer in self.kept and not self._fits(layer, more):
            self._drop_last()
        if self._done_or_dropped(layer, partial(self._add, layer, state, positions)):
            self._bytes[layer] += more

    def finish(self) -> None:
        """After the last forward: concatenate parts, and wait for copies to the host.

        Raises if even the first layer did not fit. Not earlier, as other ranks may wait in forwards.
        """
        for layer in self.kept if not self.on_host else ():
            self._done_or_dropped(layer, partial(self._join, layer))
        if self._failure is not None:
            raise self._failure
        if self._pinned:
            getattr(torch, self._device.type).current_stream(self._device).synchronize()

    def drop_from(self, stop: int) -> None:
        """Drop the layers from ``stop`` on."""
        while self.kept and self.kept[-1] >= stop:
            self._drop_last()

    def take(self, layer: int) -> tuple[Tensor, Tensor]:
        """Remove the rows of one layer and return them on the model's device, vision (r, d) and text (s, d)."""
        vision, text = self._rows.pop(layer)
        del self._bytes[layer]  # not from `kept`, the layers that were captured
        return self._whole(vision), self._whole(text)

    def _done_or_dropped(self, layer: int, action: Callable[[], None]) -> bool:
        """Run ``action``, dropping layers as long as it runs out of memory, in the end this one; True if it was run."""
        while layer in self.kept:
            try:
                action()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                free_memory(error, self._device)
                if len(self.kept) == 1:
                    self._failure = error
                self._drop_last()
            else:
                return True
        return False

    def _fits(self, layer: int, more: int) -> bool:
        if self._keep_first and len(self.kept) == 1:
            return True
        after = {**self._bytes, layer: self._bytes[layer] + more}
        joining = max(after.values()) if self._capacity is None and not self.on_host else 0
        return sum(after.values()) + joining <= self._limit

    def _bytes_to_come(self, layer: int, state: Tensor, positions: tuple[Tensor, ...]) -> int:
        if self._rows[layer][0].block is not None:
            return 0
        counts = self._capacity or [len(where) for where in positions]
        sizes = [rows_bytes(count, state.shape[1], state.dtype) for count in counts]
        return sum(map(pinned_bytes, sizes) if self._pinned else sizes)

    @property
    def _pinned(self) -> bool:
        return self.on_host and self._device.type != "cpu"

    def _drop_last(self) -> None:
        last = self.kept[-1]
        self.kept = self.kept[:-1]
        del self._rows[last], self._bytes[last]

    def _add(self, layer: int, state: Tensor, positions: tuple[Tensor, ...]) -> None:
        """Add rows of both modalities, or of none if memory runs out."""
        rows, parts = self._rows[layer], []
        if self._capacity is not None and rows[0].block is None:
            rows[0].block, rows[1].block = [self._empty(count, state) for count in self._capacity]
        for kept, where in zip(rows, positions, strict=True):
            start, count = kept.filled, len(where)
            part = self._empty(count, state) if kept.block is None else kept.block[start : start + count]
            if self.on_host:
                # On the current stream, after the kernels that compute the rows; `finish` waits for it.
                part.copy_(state.index_select(0, where), non_blocking=True)
            else:
                torch.index_select(state, 0, where, out=part)
            parts.append(part)
        for kept, part in zip(rows, parts, strict=True):
            kept.parts.append(part)

    def _empty(self, count: int, state: Tensor) -> Tensor:
        device = torch.device("cpu") if self.on_host else state.device
        return torch.empty(count, state.shape[1], dtype=state.dtype, device=device, pin_memory=self._pinned)

    def _join(self, layer: int) -> None:
        for rows in self._rows[layer]:
            if rows.block is None:
                rows.block = torch.cat(rows.parts)
                rows.parts = [rows.block]

    def _whole(self, rows: _Rows) -> Tensor:
        """All rows on the model's device, without a copy if they are there."""
        if rows.block is not None:
            if rows.filled != len(rows.block):
                raise RuntimeError(f"A layer has {rows.filled} rows, but the adapter's masks have {len(rows.block)}.")
            return rows.block.to(self._device, non_blocking=True)
        whole = torch.empty(rows.filled, rows.parts[0].shape[1], dtype=rows.parts[0].dtype, device=self._device)
        for part, place in zip(rows.parts, whole.split([len(part) for part in rows.parts]), strict=True):
            place.copy_(part, non_blocking=True)
        return whole


def _how_many(budget: float, need: float, most: int) -> int:
    return most if need * most <= budget else int(budget // need)


def _embedding_dtype(decoder: Decoder) -> torch.dtype:
    """The dtype of the embeddings, which hidden states usually have; the first forward shows a wider one."""
    weight = getattr(decoder.embedding, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight.dtype
    return next(p for p in decoder.model.parameters() if p.is_floating_point()).dtype
