# SPDX-License-Identifier: Apache-2.0
"""How much room this rank's token rows need, and what one pass over the probe therefore keeps, and where."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mir_callback import collectives
from mir_callback.model.decoder import Decoder, find_decoder
from mir_callback.model.memory import GB, Plan, budgets_of, pinned_bytes, plan_pass, rows_bytes, too_small
from mir_callback.model.stash import Stash
from mir_callback.probe.batches import EncodedProbe, Share


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
