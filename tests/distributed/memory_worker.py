# SPDX-License-Identifier: Apache-2.0
"""One rank of a group whose ranks have unlike memory: `memory_worker FOLDER`."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

from mir_callback import Probe
from mir_callback.config import MIRConfig
from mir_callback.distributed import gather_objects
from mir_callback.evaluation import hidden_states, token_statistics
from mir_callback.evaluation.evaluate import Evaluator
from mir_callback.evaluation.hidden_states import GB, Budgets
from mir_callback.probe.adapters import HuggingFaceAdapter
from tests import tiny_models
from tests.distributed.launch import write_rank
from tests.logs import logged_here
from tests.samples import pairs

COUNT = 7
LAYERS = 5
ROW = tiny_models.HIDDEN * 4
PLENTY = 10**9


class Watched:
    """Counts this rank's exchanges while an evaluation forwards its probe, until rows are measured."""

    def __init__(self) -> None:
        self.count = self.in_forwards = 0
        self._real = dist.all_gather_object
        self._enter_phase = token_statistics.enter_phase

    def __enter__(self) -> Watched:
        """Count from here on."""

        def counted(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            return self._real(*arguments, **options)

        dist.all_gather_object = counted
        token_statistics.enter_phase = self.hear  # type: ignore[assignment]
        return self

    def hear(self, phase: str) -> None:
        """Note how many there were when the first rows are measured."""
        if phase == "norms of all tokens" and not self.in_forwards:
            self.in_forwards = self.count
        self._enter_phase(phase)

    def __exit__(self, *_: object) -> None:
        """Stop counting."""
        dist.all_gather_object = self._real
        token_statistics.enter_phase = self._enter_phase


def evaluator_of(model: Any, processor: Any, config: MIRConfig) -> Evaluator:
    """Of the probe that all cases share."""
    return Evaluator(model, Probe.from_pairs(pairs(COUNT)), HuggingFaceAdapter(model, processor), config)


def run(limits: list[Budgets] | None = None, *, budget_gb: float | None = None, hungry: int | None = None) -> Any:
    """Two evaluations with this rank's limits; rank 1 asks for too much memory above ``hungry`` samples at once."""
    rank = dist.get_rank()
    model, processor = tiny_models.llava(layers=LAYERS)
    if hungry is not None and rank == 1:

        def ask(_module: Any, _args: Any, kwargs: Any) -> None:
            if len(kwargs["input_ids"]) > hungry:
                torch.empty(1 << 50)

        model.register_forward_pre_hook(ask, with_kwargs=True)
    real = hidden_states.find_budgets
    if limits is not None:
        hidden_states.find_budgets = lambda *_: limits[rank]  # type: ignore[assignment]
    try:
        evaluator = evaluator_of(model, processor, MIRConfig(batch_size=2, capture_budget_gb=budget_gb))
        found = []
        for _ in range(2):
            with logged_here() as messages, Watched() as watched:
                report = evaluator.evaluate(model, progress=False)
            shortages = [message for message in messages if "Out of memory" in message]
            found.append({**report.to_fields(), "shortages": shortages, "exchanges": watched.in_forwards})
        return {"reports": found, "error": None, "ranks_here": evaluator._ranks_here}
    except Exception as error:
        return {"reports": None, "error": f"{type(error).__name__}: {error}"}
    finally:
        hidden_states.find_budgets = real


def main(folder: str) -> None:
    """Run every case; after a bad one the ranks must still be in step for the next."""
    dist.init_process_group("gloo")
    model, processor = tiny_models.llava(layers=LAYERS)
    rows = evaluator_of(model, processor, MIRConfig())._encoded.shard.row_counts
    assert rows is not None
    layer = max(gather_objects(sum(rows) * ROW))
    free = Budgets(PLENTY, 0, given=False)
    cases = {
        "whole": run(),
        "one rank in passes": run([free, Budgets(2 * layer, 0, given=True)]),
        "one rank on its host": run([free, Budgets(2 * layer, PLENTY, given=True)]),
        "unlike ways": run([Budgets(3 * layer, PLENTY, given=True), Budgets(2 * layer, 0, given=True)]),
        "too small": run(budget_gb=0.9 * layer / GB),
        "one rank hungry": run(hungry=1),
        "one rank never fed": run(hungry=0),
    }
    write_rank(folder, dist.get_rank(), cases)


if __name__ == "__main__":
    main(*sys.argv[1:])
