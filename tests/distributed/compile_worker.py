# SPDX-License-Identifier: Apache-2.0
"""One rank of a model under FSDP2 whose layers are compiled, trained without and with evaluations."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mir_callback import Probe, evaluate_mir
from tests import tiny_models
from tests.distributed.launch import write_rank
from tests.model.test_compile import Backend, train
from tests.samples import pairs
from tests.training.runs import collator


def main(folder: str) -> None:
    """Write losses and numbers of graphs of both, and the values."""
    dist.init_process_group("gloo")
    probe, mesh = Probe.from_pairs(pairs(4)), init_device_mesh("cpu", (dist.get_world_size(),))
    found, values = [], []
    for watched in (False, True):
        torch._dynamo.reset()
        model, processor = tiny_models.llava(dropout=0.2)
        backend = Backend()
        for layer in model.model.language_model.layers:
            layer.compile(backend=backend)
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)

        def evaluate(model: torch.nn.Module = model, processor: object = processor) -> None:
            values.append(evaluate_mir(model, probe, processor=processor, batch_size=1).mir)

        batch = collator(processor)(pairs(2, seed=9 + dist.get_rank()))
        losses = train(model, batch, evaluate if watched else lambda: None)
        found.append({"losses": losses, "graphs": backend.graphs})
    write_rank(folder, dist.get_rank(), {"plain": found[0], "watched": found[1], "values": values})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
