# SPDX-License-Identifier: Apache-2.0
"""One rank that runs clients in a layout, each without MIR and with it: `worker FOLDER LAYOUT CLIENT,CLIENT...`."""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from mir_callback import MIRMonitor
from tests.distributed.launch import write_rank
from tests.matrix.clients import CLIENTS, Run, forget, watching

# Of the clock, not of the run.
TIMES = ("runtime", "per_second", "seconds", "memory", "elapsed")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a DTensor, or the tensor."""
    return getattr(tensor, "_local_tensor", tensor).detach()


def digest(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """A hash of each, over its bits."""
    return {
        name: hashlib.sha256(local(each).cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, each in tensors.items()
    }


def optimizer_state(optimizer: Any) -> dict[str, torch.Tensor]:
    """Every tensor an optimizer keeps, the innermost one of those that wrap each other."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"{index}.{name}": value
        for index, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def unsharded(model: nn.Module) -> int:
    """How many weights that have shards are not in them."""
    left = sum(each.ds_status.name != "NOT_AVAILABLE" for each in model.parameters() if hasattr(each, "ds_status"))
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            state = module._get_fsdp_state()
            left += sum(not group.is_sharded for group in state._fsdp_param_groups)
            left += len(getattr(state._comm_ctx, "post_forward_order", ()))
        elif isinstance(module, FullyShardedDataParallel) and module._handle is not None:
            padded = getattr(module._handle.flat_param, "_full_param_padded", None)
            left += padded is not None and padded.untyped_storage().size() > 0
    return left


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights, on every rank, by their names in the bare model."""
    parameters = dict(model.named_parameters())
    gathered: Any = nullcontext()
    if any(hasattr(each, "ds_id") for each in parameters.values()):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(parameters.values()))
    elif any(isinstance(each, FullyShardedDataParallel) for each in model.modules()):
        gathered = FullyShardedDataParallel.summon_full_params(model)
    with gathered:
        found = {}
        for name, each in model.named_parameters():
            whole = each.full_tensor() if hasattr(each, "full_tensor") else each
            bare = name.replace("_fsdp_wrapped_module.", "").removeprefix("module.")
            found[bare] = whole.detach().clone()
    return found


def is_ours(row: dict[str, Any]) -> bool:
    return any(name.split("/")[-1] == "mir" or name.startswith("mir") for name in row)


def rows_of(run: Run) -> list[dict[str, Any]]:
    """All that others log, but for the clock."""
    rows = [row for row in run.rows if not is_ours(row)]
    return [{name: repr(value) for name, value in row.items() if not any(t in name for t in TIMES)} for row in rows]


def run(client: str, setup: str, folder: Path, watch: dict[str, Any] | None) -> dict[str, Any]:
    """One run, and everything that must not differ."""
    forget()
    environment = dict(os.environ)
    left: list[int] = []
    evaluate = MIRMonitor.evaluate

    def counted(monitor: Any) -> Any:
        record = evaluate(monitor)
        left.append(unsharded(monitor._model))
        return record

    MIRMonitor.evaluate = counted  # type: ignore[method-assign]
    try:
        done = CLIENTS[client](setup, folder, watch)
    finally:
        MIRMonitor.evaluate = evaluate  # type: ignore[method-assign]
        os.environ.clear()
        os.environ.update(environment)
    streams = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    weights = whole_weights(done.model)
    if watch is not None and (not dist.is_initialized() or dist.get_rank() == 0):
        torch.save(weights, folder / "weights.pt")
    return {
        "rows": rows_of(done),
        "weights": digest(weights),
        "optimizer": digest(optimizer_state(done.optimizer)),
        "random": [hashlib.sha256(repr(stream).encode()).hexdigest() for stream in streams],
        "flags": {name: module.training for name, module in done.model.named_modules()},
        "ours": sum(is_ours(row) for row in done.rows),
        "history": [record.to_dict() for record in done.history],
        "left": left,
    }


def main(folder: str, setup: str, names: str) -> None:
    """Every client, plain and watched."""
    ranks = "RANK" in os.environ
    if ranks:
        dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for client in names.split(","):
        found[client] = {}
        for what, watch in (("plain", None), ("watched", watching(setup))):
            started = time.process_time()
            place = Path(folder) / client / what
            place.mkdir(parents=True, exist_ok=True)
            found[client][what] = run(client, setup, place, watch)
            found[client][what]["seconds"] = time.process_time() - started
    write_rank(folder, dist.get_rank() if ranks else 0, found)
    if ranks:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
