# SPDX-License-Identifier: Apache-2.0
"""Where the token rows of this rank wait between forwards and maths: on the device, in host memory, or in parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from mir_callback import distributed
from mir_callback.errors import ConfigError
from mir_callback.evaluation.memory import find_device, free_memory, free_on_device, free_on_host, is_out_of_memory
from mir_callback.model.decoder import Decoder

GB = 10**9
_FREE_SHARE = 0.5  # of what is free: the forwards and the solves need room too


@dataclass(frozen=True)
class Budgets:
    """Bytes that this rank's rows may take."""

    device: float  # where the model is
    host: float  # in host memory besides; 0 where that is the device itself
    given: bool  # whether the user named the device's; if so not even one layer may go beyond it


@dataclass(frozen=True)
class StoragePlan:
    """What one pass over the probe keeps."""

    on_host: bool  # whether rows lie in host memory between the forwards and the maths, else on the device
    count: int  # layers kept, at most as many as are left; 0 if not even one fits
    at_once: int  # layers on the device at a time for the maths


@dataclass(frozen=True)
class ExpectedRows:
    """What a rank knows of the rows that its samples bring to each layer."""

    counts: tuple[int, int] | None  # vision and text rows, or None as long as only a forward can tell
    exact: bool  # whether the batches themselves tell, so that the place of all rows can be taken at once
    dtype: torch.dtype | None = None  # of the hidden states, once seen
    pinned_bytes: int = 0  # host memory that torch holds since an earlier evaluation

    @property
    def spare_layers(self) -> int:
        """Layers for which room is needed while rows are joined, which they are where their number was not known."""
        return 0 if self.exact else 1

    def layer_bytes(self, decoder: Decoder) -> tuple[int, int]:
        """Bytes of one layer on the device and in host memory; (0, 0) as long as only a forward can tell."""
        if self.counts is None:
            return 0, 0
        dtype = self.dtype or _embedding_dtype(decoder.model)
        sizes = [rows_bytes(count, decoder.hidden_size, dtype) for count in self.counts]
        # Parts of unknown size are rounded up one by one, to less than twice their size.
        pinned = sum(map(pinned_bytes, sizes)) if self.exact else 2 * sum(sizes)
        return sum(sizes), pinned

    def after_pass(self, store: HiddenStateStore, sample_rows: Tensor) -> ExpectedRows:
        """What is known after a pass that has filled a store with rows of samples, (n, 2)."""
        vision, text = (int(count) for count in sample_rows.sum(dim=0))
        pinned = max(self.pinned_bytes, store.held_bytes if store.on_host else 0)
        return ExpectedRows((vision, text), self.exact, store.dtype, pinned)


def find_budgets(device: torch.device, capture_budget_gb: float | None, ranks_here: int, pinned: int = 0) -> Budgets:
    """What this rank may use, one of ``ranks_here`` who share the machine, if torch has ``pinned`` bytes already."""
    host = _FREE_SHARE * free_on_host() / ranks_here
    given = capture_budget_gb is not None
    limit = capture_budget_gb * GB if capture_budget_gb is not None else None
    if device.type == "cpu":
        return Budgets(host if limit is None else limit, 0, given)
    return Budgets(_FREE_SHARE * free_on_device(device) if limit is None else limit, host + pinned, given)


def plan_pass(
    layers: int, need: float, host_need: float, budgets: Budgets, *, spare: int = 0, world: int = 1
) -> StoragePlan:
    """Where to keep rows, and of how many of the layers that are left.

    All on the device if they fit there; else in host memory; else as many as fit, evenly over several passes. Plans of
    ranks differ, and the smallest counts. Ranks: pure.

    Args:
        layers: number of layers left, at least 1.
        need: bytes of one layer's rows on the device.
        host_need: bytes of one layer's rows in host memory.
        budgets: of this rank.
        spare: layers for which room on the device is needed besides while rows are joined.
        world: number of ranks; they solve one layer each side by side, so multiples of it are preferred.
    """
    least = 0 if budgets.given else 1
    fitting = max(_how_many(budgets.device, need, layers + spare) - spare, least)
    if fitting >= layers:
        return StoragePlan(False, layers, layers)
    at_once = max(_how_many(budgets.device, need, layers), least)  # rows from the host are joined on arrival
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
    """What will keep this rank's rows of layers from ``first`` on, and for how many layers the device has room then."""
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
    """The error for a budget that not even one layer fits into; ``need`` in bytes."""
    unit = 10.0 ** (math.floor(math.log10(need / GB)) - 1)
    enough = math.ceil(need / GB / unit * (1 - 1e-12)) * unit  # two digits, never below it
    return ConfigError(
        f"capture_budget_gb={capture_budget_gb:g} does not hold the rows of one decoder layer, {need / GB:.3g} GB on "
        f"the rank with the most; allow at least {enough:.2g}, or use fewer samples or more ranks"
    )


def rows_bytes(count: int, dim: int, dtype: torch.dtype) -> int:
    """Bytes of ``count`` rows of ``dim`` numbers. Ranks: pure."""
    return count * dim * torch.empty((), dtype=dtype).element_size()


def pinned_bytes(size: int) -> int:
    """What torch takes for ``size`` bytes of pinned host memory: the next power of two. Ranks: pure."""
    return 1 << (size - 1).bit_length() if size > 0 else 0


@dataclass
class _Rows:
    """One modality of one layer: the parts so far, which are views of a block where the number of rows was known."""

    parts: list[Tensor] = field(default_factory=list)
    block: Tensor | None = None

    @property
    def filled(self) -> int:
        return sum(map(len, self.parts))


class HiddenStateStore:
    """Rows of a range of layers; what is kept is always complete. Ranks: pure.

    Args:
        layers: which to keep; ``kept`` are those that are complete so far, it ends earlier if memory did not suffice.
        limit: bytes that may be held, what is needed to join parts included.
        keep_first: hold the first layer even beyond the limit.
        capacity: vision and text rows that will come to each layer, for which place is then taken once; or None if
            that is not known, and they have to be joined.
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
        self.dtype: torch.dtype | None = None  # of the rows, once some were offered
        self._failure: Exception | None = None  # to allocate even the first layer
        self._limit, self._keep_first, self._capacity = limit, keep_first, capacity
        self._device = torch.device("cpu")
        self._rows = {layer: (_Rows(), _Rows()) for layer in layers}
        self._bytes = dict.fromkeys(layers, 0)

    @property
    def held_bytes(self) -> int:
        """Bytes of all rows, or of their place where that is taken already."""
        return sum(self._bytes.values())

    def append(self, layer: int, state: Tensor, positions: tuple[Tensor, ...]) -> None:
        """Copy vision and text rows of a state (n, d), here and now; for want of memory the last layers are dropped."""
        self.dtype, self._device = state.dtype, state.device
        if layer not in self.kept:
            return
        more = self._bytes_to_come(layer, state, positions)
        while layer in self.kept and not self._fits(layer, more):
            self._drop_last()
        if self._done_or_dropped(layer, partial(self._add, layer, state, positions)):
            self._bytes[layer] += more

    def finish(self) -> None:
        """After the last forward: join what has to be joined, and wait for rows on their way to the host.

        Only here raises the failure to keep even the first layer, as other ranks may wait in forwards.
        """
        for layer in self.kept if not self.on_host else ():
            self._done_or_dropped(layer, partial(self._join, layer))
        if self._failure is not None:
            raise self._failure
        if self._pinned:
            getattr(torch, self._device.type).current_stream(self._device).synchronize()

    def drop_from(self, stop: int) -> None:
        """Let go of the layers from ``stop`` on."""
        while self.kept and self.kept[-1] >= stop:
            self._drop_last()

    def take(self, layer: int) -> tuple[Tensor, Tensor]:
        """Hand over the rows of one layer on the model's device, vision (r, d) and text (s, d), and let go of them."""
        vision, text = self._rows.pop(layer)
        del self._bytes[layer]  # `kept` stays: it says what came to be complete
        return self._whole(vision), self._whole(text)

    def _done_or_dropped(self, layer: int, action: Callable[[], None]) -> bool:
        """Do it, or while memory runs out drop layer after layer, in the end this one; whether it was done."""
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
        """All of it or, where memory runs out, nothing."""
        rows, parts = self._rows[layer], []
        if self._capacity is not None and rows[0].block is None:
            rows[0].block, rows[1].block = [self._empty(count, state) for count in self._capacity]
        for kept, where in zip(rows, positions, strict=True):
            start, count = kept.filled, len(where)
            part = self._empty(count, state) if kept.block is None else kept.block[start : start + count]
            if self.on_host:
                # On the current stream, behind what computes the rows; whoever reads them waits, see `finish`.
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
        """On the model's device; from there itself without a copy."""
        if rows.block is not None:
            if rows.filled != len(rows.block):
                raise RuntimeError(f"a layer must come to {len(rows.block)} rows, as announced, got {rows.filled}")
            return rows.block.to(self._device, non_blocking=True)
        whole = torch.empty(rows.filled, rows.parts[0].shape[1], dtype=rows.parts[0].dtype, device=self._device)
        for part, place in zip(rows.parts, whole.split([len(part) for part in rows.parts]), strict=True):
            place.copy_(part, non_blocking=True)
        return whole


def _how_many(budget: float, need: float, most: int) -> int:
    return most if need * most <= budget else int(budget // need)


def _embedding_dtype(model: nn.Module) -> torch.dtype:
    """The dtype hidden states begin with, that of the embeddings; a wider one is noticed in the first forward."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight.dtype
    return next(p for p in model.parameters() if p.is_floating_point()).dtype
