# SPDX-License-Identifier: Apache-2.0
"""Reports an evaluation to everything that watches the run. None of it can end the run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from mir_callback import collectives
from mir_callback.training import definitions, trackers, wandb_run
from mir_callback.training.alerts import due_alert
from mir_callback.training.history import Record


class Reports:
    """Sends each evaluation to the Trainer's reporters and to wandb.

    A tracker that fails costs one warning; training, the history file and the other trackers go on.

    Args:
        trainer: the Trainer to log through, or None for wandb alone.
    """

    def __init__(self, trainer: Any = None) -> None:
        self.attached = trainer is not None
        self._log = trackers.through_trainer(trainer) if self.attached else None
        self._reporters: Callable[[], list[Any]] = lambda: trainer.callback_handler.callbacks if self.attached else []
        self._defined = False
        self._failed: set[str] = set()

    def begin(self) -> None:
        """A run begins: trackers may hold a new one, which has not been told how values are made."""
        self._defined = False

    def send(self, record: Record, history: Sequence[Record], options: Mapping[str, Any]) -> None:
        """Report an evaluation; nothing if it failed.

        Args:
            record: the evaluation.
            history: all of the run's so far.
            options: of the callback, for the definition that goes into each run's settings once.

        Ranks: all, as `Trainer.log` is; pictures and settings are rank 0's.
        """
        if record["mir"] is None:
            return
        run = wandb_run.active()
        reporters = self._reporters()
        # The Trainer's reporter logs to wandb too; without it we do.
        direct = run is not None and not any(definitions.is_kind(reporter, "WandbCallback") for reporter in reporters)
        if collectives.is_main():
            if not self._defined:
                self._define(run if direct else None, reporters, definitions.definition_of(record, options))
            if run is not None:
                with self._guarded("wandb"):
                    wandb_run.add_charts(run, record, history)
                self._alert(run, record, history)
        values = trackers.log_values(record, history)
        if self._log is not None:
            with self._guarded("the Trainer's reporters"):
                self._log(values, record)
        if direct:
            with self._guarded("wandb"):
                wandb_run.log(run, values, record["step"])

    def _alert(self, run: Any, record: Record, history: Sequence[Record]) -> None:
        alert = due_alert([old for old in history if old is not record], record)
        if alert is not None:
            with self._guarded("wandb alerts"):
                wandb_run.send_alert(run, alert)

    def _define(self, bare_run: Any, reporters: list[Any], definition: Mapping[str, Any]) -> None:
        if bare_run is not None:
            with self._guarded("wandb"):
                wandb_run.use_trainers_axis(bare_run)
        for name, write in definitions.writers(reporters):
            with self._guarded(name):
                write(definition)
        self._defined = True

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """A failure inside is a warning, once for each tracker. No collectives inside."""
        try:
            yield
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                warnings.warn(
                    f"MIR could not be logged to {name}, training goes on: {type(error).__name__}: {error}; the values "
                    "are in the history file, and further failures there are not reported",
                    stacklevel=3,
                )
