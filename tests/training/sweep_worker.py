# SPDX-License-Identifier: Apache-2.0
"""One rank of a search: `sweep_worker FOLDER pruned|finished`, three trials of which the later two may be pruned."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import optuna
import torch.distributed as dist
from transformers import Trainer

from mir_callback import MIRCallback, Probe, hyperparameter_search
from tests import tiny_models
from tests.distributed.launch import write_rank
from tests.samples import pairs
from tests.training.runs import make_trainer

STEPS = 4


def searching_trainer(folder: str | Path, **options: Any) -> Trainer:
    """The small Trainer of other tests, with a model made anew for each trial."""
    plain = make_trainer(folder, **{"steps": 2, **options})
    return Trainer(
        model_init=lambda: tiny_models.llava(dropout=0.0)[0],
        args=plain.args,
        train_dataset=plain.train_dataset,
        eval_dataset=plain.eval_dataset,
        data_collator=plain.data_collator,
        processing_class=plain.processing_class,
    )


class PruneLater(optuna.pruners.BasePruner):
    """Ends every trial but the first at its second step."""

    def prune(self, study: Any, trial: Any) -> bool:
        return trial.number > 0 and trial.last_step >= 2


class Noted(MIRCallback):
    """Keeps what a trial has measured when it ends."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.trials: list[list[tuple[int, float]]] = []

    def on_train_end(self, *arguments: Any, **kwargs: Any) -> None:
        super().on_train_end(*arguments, **kwargs)
        self.trials.append([(record.step, record.mir) for record in self.history])


def main(folder: str, pruned: str) -> None:
    """Search, then write what this rank saw."""
    trainer = searching_trainer(Path(folder) / "run", steps=STEPS)
    callback = Noted(Probe.from_pairs(pairs(3)), every=1).attach(trainer)
    storage = optuna.storages.InMemoryStorage()
    best = hyperparameter_search(
        trainer,
        backend="optuna",
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)},
        n_trials=3,
        sampler=optuna.samplers.RandomSampler(seed=0),
        storage=storage,
        study_name="search",
        pruner=PruneLater() if pruned == "pruned" else optuna.pruners.NopPruner(),
    )
    rank = dist.get_rank()
    states = [] if rank else [t.state.name for t in optuna.load_study(study_name="search", storage=storage).trials]
    found = {"histories": callback.trials, "states": states, "best": None if best is None else best.objective}
    write_rank(folder, rank, found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
