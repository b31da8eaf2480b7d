# SPDX-License-Identifier: Apache-2.0
"""One rank of a training run: `train_worker FOLDER SETUP on|best|beside|off [cpu|cuda]`; SETUP is one of SETUPS.

`best` keeps the best model too; the extra word `gather` has ZeRO-3 consolidate
weights in checkpoints.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from mir_callback import MIRCallback, Probe, evaluate_mir
from mir_callback.config import MIRConfig
from mir_callback.evaluation import forward
from mir_callback.evaluation.evaluate import Evaluator
from mir_callback.probe.adapters import find_adapter
from tests.distributed.launch import write_rank
from tests.samples import pairs
from tests.training.runs import ACCUMULATION, MICRO_BATCH, make_trainer, optimizer_state

STEPS = 6
EVERY = 2
SMALL_BUDGET_GB = 4e-5  # two of three layers
NUM_SAMPLES = 7  # odd: the last rank comes out one short and repeats a sample


# Beyond the stage: offloading to host memory, bfloat16 with recomputed activations, torch.compile.
SETUPS = ("ddp", "0", "1", "2", "3", "2 offload", "3 offload", "3 bf16 checkpointing", "2 compiled")


def deepspeed_config(setup: str) -> dict[str, Any] | None:
    """A configuration as users write it, with thresholds small enough that the tiny weights are really sharded."""
    if setup == "ddp":
        return None
    stage, *extras = setup.split()
    zero: dict[str, Any] = {"stage": int(stage)}
    if stage == "3":
        zero |= {"stage3_param_persistence_threshold": 0, "log_trace_cache_warnings": True}
    if "gather" in extras:
        zero |= {"stage3_gather_16bit_weights_on_model_save": True}
    if "offload" in extras:
        zero |= {"offload_optimizer": {"device": "cpu"}}
        zero |= {"offload_param": {"device": "cpu"}} if stage == "3" else {}
    return {
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        **({"bf16": {"enabled": True}} if "bf16" in extras else {}),
    }


class GatheredWeights(TrainerCallback):
    """Notes after every step how many ZeRO-3 weights are not back in their shards."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.count(f"step {state.global_step}", model)

    def count(self, when: str, model: torch.nn.Module) -> None:
        """Note it now."""
        statuses = [parameter.ds_status.name for parameter in model.parameters() if hasattr(parameter, "ds_status")]
        self.left[when] = sum(status != "NOT_AVAILABLE" for status in statuses)


def final_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All weights whole, on every rank."""
    parameters = dict(model.named_parameters())
    gathered: Any = contextlib.nullcontext()
    if any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(parameters.values()))
    with gathered:
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def digest(weights: dict[str, torch.Tensor]) -> str:
    """One hash over all tensors."""
    joined = hashlib.sha256()
    for name in sorted(weights):
        joined.update(weights[name].cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return joined.hexdigest()


def random_state(on_gpu: bool) -> torch.Tensor:
    """Where the random streams stand."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if on_gpu else [])]
    return torch.cat(states)


class WithLeftovers(TrainerCallback):
    """At the end, evaluates with all weights gathered, as others may leave them, in one pass and in several."""

    def __init__(self, trainer: Any, probe: Probe) -> None:
        self.gathered = GatheredWeights()
        self.reports: list[dict[str, Any]] = []
        self._trainer = trainer
        self._probe = probe

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == STEPS:
            for budget in (None, SMALL_BUDGET_GB):
                self._evaluate(model, budget)

    def _evaluate(self, model: torch.nn.Module, budget: float | None) -> None:
        weights: list[Any] = list(model.parameters())
        weights[0].all_gather(param_list=weights)
        self.gathered.count(f"left by others, {budget}", model)
        adapter = find_adapter(model, self._trainer.processing_class)
        evaluator = Evaluator(model, self._probe, adapter, MIRConfig(batch_size=2, capture_budget_gb=budget))
        enter_phase = forward.enter_phase

        def count(phase: str, *find_failure: Any) -> None:
            enter_phase(phase, *find_failure)
            when = f"ours, {budget}"
            if phase.startswith("forward of batch 1 ") and when not in self.gathered.left:
                self.gathered.count(when, model)

        forward.enter_phase = count
        report = evaluator.evaluate(model, optimizer=self._trainer.optimizer)
        forward.enter_phase = enter_phase
        self.reports.append(report.to_fields())
        self.gathered.count(f"afterwards, {budget}", model)


def main(folder: str, setup: str, watched: str, device: str = "cpu") -> None:
    """Train, then write what this rank saw."""
    on_gpu = device == "cuda"
    trainer = make_trainer(
        Path(folder) / "run",
        steps=STEPS,
        deepspeed=deepspeed_config(setup),
        dropout=0.2,
        bf16="bf16" in setup,
        gradient_checkpointing="checkpointing" in setup,
        torch_compile_backend="eager" if "compiled" in setup else None,
        use_cpu=not on_gpu,
        full_determinism=on_gpu,
        ddp_backend="nccl" if on_gpu else "gloo",
    )
    callback = None
    if watched != "off":
        probe = Probe.from_pairs(pairs(NUM_SAMPLES), matched=True)
        options = {"keep_best": watched == "best", "vision_gain": watched == "on"}
        callback = MIRCallback(probe, every=EVERY, batch_size=2, **options).attach(trainer)
    gathered = GatheredWeights()
    trainer.add_callback(gathered)
    leftovers = None
    if callback and setup == "3":
        leftovers = WithLeftovers(trainer, probe)
        trainer.add_callback(leftovers)
    trainer.train()
    wrapped = None
    if callback:
        wrapped = evaluate_mir(trainer.model_wrapped, probe, processor=trainer.processing_class).mir
        gathered.count("after a wrapped model", trainer.model)
    weights = final_weights(trainer.model)
    if dist.get_rank() == 0:
        torch.save(weights, Path(folder) / "weights.pt")
    write_rank(
        folder,
        dist.get_rank(),
        {
            "log": [
                [entry["step"], entry["loss"], entry.get("grad_norm"), entry["learning_rate"]]
                for entry in trainer.state.log_history
                if "loss" in entry
            ],
            "weights": digest(weights),
            "optimizer": digest(optimizer_state(trainer.optimizer)),
            "rng": hashlib.sha256(random_state(on_gpu).numpy().tobytes()).hexdigest(),
            "history": callback.history if callback else [],
            "wrapped": wrapped,
            "gathered": gathered.left,
            "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
            "leftovers": {"gathered": leftovers.gathered.left, "reports": leftovers.reports} if leftovers else None,
        },
    )
    dist.destroy_process_group()  # left open, it may abort the process at its exit


if __name__ == "__main__":
    main(*sys.argv[1:])
