# SPDX-License-Identifier: Apache-2.0
"""How much room this rank's token rows need, and what one pass over the probe therefore keeps, and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from mir_callback import distributed as collectives
from mir_callback.evaluation.memory import (
    GB,
    Plan,
    budgets_of,
    is_out_of_memory,
    let_go,
    pinned_bytes,
    plan_pass,
    rows_bytes,
    too_small,
)
from mir_callback.model.decoder import Decoder, find_decoder
from mir_callback.probe.batches import EncodedProbe, Share


@dataclass
class _Rows:
    """One modality of one layer: the parts so far, or one block of known size that they are written into."""

    parts: list[Tensor] = field(default_factory=list)
    block: Tensor | None = None
    filled: int = 0


class Stash:
    """Rows of a range of layers; what is kept is always complete.

    Args:
        layers: which layers to keep.
        limit: bytes that may be held, what is needed to join parts included.
        keep_first: hold the first layer even beyond the limit.
        capacity: vision and text rows that will come to each layer, or None if that is not known. Known, their place
            is taken once and nothing has to be joined.
        on_host: keep rows in host memory, pinned if they come from a GPU.

    Attributes:
        kept: the layers that are complete so far; ends earlier than ``layers`` where memory did not suffice.
        dtype: of the rows, once some were offered.
        failure: the allocation failure that left not even the first layer, or None.
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
        self.kept = layers
        self.dtype: torch.dtype | None = None
        self.failure: Exception | None = None
        self._limit = limit
        self._keep_first = keep_first
        self._capacity = capacity
        self._on_host = on_host
        self._device = torch.device("cpu")
        self._rows = {layer: (_Rows(), _Rows()) for layer in layers}
        self._bytes = dict.fromkeys(layers, 0)

    @property
    def held_bytes(self) -> int:
        """Bytes of all rows, or of their place where that is taken already."""
        return sum(self._bytes.values())

    def append(self, layer: int, state: Tensor, positions: tuple[Tensor, ...]) -> None:
        """Copy rows of a layer, here and now; what can't be kept costs the last layers.

        Args:
            layer: its index.
            state: (n, d) on the model's device.
            positions: indices of vision rows and of text rows, on the same device.

        Ranks: pure; never raises for want of memory.
        """
        self.dtype, self._device = state.dtype, state.device
        if layer not in self.kept:
            return
        more = self._bytes_to_come(layer, state, positions)
        while layer in self.kept and not self._fits(layer, more):
            self._drop_last()
        if self._done_or_dropped(layer, partial(self._add, layer, state, positions)):
            self._bytes[layer] += more

    def settle(self) -> None:
        """After the last forward: join what has to be joined, and wait for rows on their way to the host.

        Raises:
            Exception: the allocation failure that left not even the first layer. Not before, as forwards go on that
                other ranks may wait in.
        """
        for layer in self.kept if not self._on_host else ():
            self._done_or_dropped(layer, partial(self._join, layer))
        if self.failure is not None:
            raise self.failure
        if self._pinned:
            getattr(torch, self._device.type).current_stream(self._device).synchronize()

    def keep_until(self, stop: int) -> None:
        """Let go of the layers from ``stop`` on."""
        while self.kept and self.kept[-1] >= stop:
            self._drop_last()

    def take(self, layer: int) -> tuple[Tensor, Tensor]:
        """Hand over the rows of one layer on the model's device, and let go of them.

        Returns:
            vision (r, d) and text (s, d) of this rank, r or s may be 0.

        Ranks: pure.
        """
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
                let_go(error, self._device)
                if len(self.kept) == 1:
                    self.failure = error
                self._drop_last()
            else:
                return True
        return False

    def _fits(self, layer: int, more: int) -> bool:
        if self._keep_first and len(self.kept) == 1:
            return True
        after = {**self._bytes, layer: self._bytes[layer] + more}
        joining = max(after.values()) if self._capacity is None and not self._on_host else 0
        return sum(after.values()) + joining <= self._limit

    def _bytes_to_come(self, layer: int, state: Tensor, positions: tuple[Tensor, ...]) -> int:
        counts = [len(where) for where in positions]
        if self._capacity is not None:
            counts = [0, 0] if self._rows[layer][0].block is not None else list(self._capacity)
        sizes = [rows_bytes(count, state.shape[1], state.dtype) for count in counts]
        return sum(map(pinned_bytes, sizes) if self._pinned else sizes)

    @property
    def _pinned(self) -> bool:
        return self._on_host and self._device.type != "cpu"

    def _drop_last(self) -> None:
        last = self.kept[-1]
        self.kept = self.kept[:-1]
        del self._rows[last], self._bytes[last]

    def _add(self, layer: int, state: Tensor, positions: tuple[Tensor, ...]) -> None:
        """All of it or, where memory runs out, nothing."""
        rows = self._rows[layer]
        if self._capacity is None:
            parts = [self._empty(len(where), state) for where in positions]
            for part, where in zip(parts, positions, strict=True):
                self._copy(state, where, part)
            for kept, part in zip(rows, parts, strict=True):
                kept.parts.append(part)
            return
        if rows[0].block is None:
            blocks = [self._empty(count, state) for count in self._capacity]
            rows[0].block, rows[1].block = blocks
        for kept, where in zip(rows, positions, strict=True):
            assert kept.block is not None
            self._copy(state, where, kept.block[kept.filled : kept.filled + len(where)])
        for kept, where in zip(rows, positions, strict=True):
            kept.filled += len(where)

    def _empty(self, count: int, state: Tensor) -> Tensor:
        place = torch.device("cpu") if self._on_host else state.device
        return torch.empty(count, state.shape[1], dtype=state.dtype, device=place, pin_memory=self._pinned)

    def _copy(self, state: Tensor, where: Tensor, target: Tensor) -> None:
        if self._on_host:
            # On the current stream, behind what computes the rows; whoever reads them waits, see `settle`.
            target.copy_(state.index_select(0, where), non_blocking=True)
        else:
            torch.index_select(state, 0, where, out=target)

    def _join(self, layer: int) -> None:
        for rows in self._rows[layer]:
            if rows.block is None:
                rows.block = torch.cat(rows.parts)
                rows.filled, rows.parts = len(rows.block), []

    def _whole(self, rows: _Rows) -> Tensor:
        """On the model's device; from there itself without a copy."""
        if rows.block is not None:
            if rows.filled != len(rows.block):
                raise RuntimeError(f"a layer must come to {len(rows.block)} rows, as announced, got {rows.filled}")
            return rows.block.to(self._device, non_blocking=True)
        size = sum(map(len, rows.parts)), rows.parts[0].shape[1]
        whole = torch.empty(size, dtype=rows.parts[0].dtype, device=self._device)
        start = 0
        for part in rows.parts:
            whole[start : start + len(part)].copy_(part, non_blocking=True)
            start += len(part)
        return whole


def check_budget(model: nn.Module, encoded: EncodedProbe, budget_gb: float | None) -> None:
    """Refuse before any forward a budget that is known to be too small for one layer.

    Where only a forward shows how many rows there are, :func:`observe` refuses it after its first pass.

    Raises:
        ConfigError: it is.

    Ranks: each for itself.
    """
    need = need_of(encoded.share, find_decoder(model))
    if budget_gb is not None and need is not None and need[0] > budget_gb * GB:
        raise too_small(budget_gb, need[0])


def prepared(model: nn.Module, decoder: Decoder, encoded: EncodedProbe, start: int) -> tuple[Plan, Stash]:
    """What this rank will keep of the layers from ``start`` on, and where. Ranks: each for itself."""
    share = encoded.share
    layers = range(start, len(decoder.layers))
    budgets = budgets_of(device_of(model), encoded.capture_budget_gb, encoded.ranks_here, share.pinned)
    need = need_of(share, decoder)
    if need is None:
        plan = Plan("device", len(layers), len(layers))
    else:
        plan = plan_pass(len(layers), *need, budgets, spare=spare_of(share), world=collectives.world_size())
    stash = Stash(
        layers[: plan.count],
        limit=budgets.device if plan.place == "device" else budgets.host,
        keep_first=not budgets.given,
        capacity=share.rows if share.rows_are_exact else None,
        on_host=plan.place == "host",
    )
    return plan, stash


def spare_of(share: Share) -> int:
    """Layers for which room is needed while rows are joined, which they are where their number was not known."""
    return 0 if share.rows_are_exact else 1


def need_of(share: Share, decoder: Decoder) -> tuple[int, int] | None:
    """Bytes of one layer of this rank on the device and in host memory, or None if only a forward can tell."""
    if share.rows is None:
        return None
    dtype = share.dtype or _stream_dtype(decoder.model)
    sizes = [rows_bytes(count, decoder.hidden_size, dtype) for count in share.rows]
    # Parts of unknown size are rounded up one by one, to less than twice their size.
    pinned = sum(map(pinned_bytes, sizes)) if share.rows_are_exact else 2 * sum(sizes)
    return sum(sizes), pinned


def _stream_dtype(model: nn.Module) -> torch.dtype:
    """The dtype hidden states begin with, that of the embeddings; a wider one is noticed in the first forward."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight.dtype
    return next(p for p in model.parameters() if p.is_floating_point()).dtype


def device_of(model: nn.Module) -> torch.device:
    """Where the model is. Ranks: pure."""
    return next((p.device for p in model.parameters() if p.is_floating_point()), torch.device("cpu"))
