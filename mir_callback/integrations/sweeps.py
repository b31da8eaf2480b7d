# SPDX-License-Identifier: Apache-2.0
"""Hyperparameter search by MIR or vision gain with the backends of the Trainer: Optuna and Ray Tune."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mir_callback import distributed
from mir_callback.errors import ConfigError
from mir_callback.integrations.huggingface import MIRCallback, run_folder
from mir_callback.record import DEFINITION_FIELDS, EvalRecord, lowest_record, read_definition

OBJECTIVES = ("mir", "mir_best", "vision_gain")
BACKENDS = ("optuna", "ray")
# Options of Trainer.hyperparameter_search that are set here, and why.
_OURS = {"compute_objective": "choose with objective=", "direction": "MIR is minimized, vision gain maximized"}


def hyperparameter_search(trainer: Any, objective: str = "mir", *, backend: str | None = None, **options: Any) -> Any:
    """`Trainer.hyperparameter_search` that minimizes MIR or maximizes vision gain; needs no evaluation data set.

    Each trial writes its own history (and best weights, with ``keep_best``) to the folder the Trainer gives it:
    `<output_dir>/run-0`, `run-1`, ... Each evaluation is reported to the backend, which may end the trial early. A
    trial whose last evaluation failed counts as failed.

    With Optuna, trials have the user attributes `mir_se`, `mir_folder` and `mir_definition`, and a study loaded from a
    storage must have been measured with the same probe and root. Trials are pruned only if you pass a ``pruner``: MIR
    often rises first, so choose one that waits, e.g. `MedianPruner(n_warmup_steps=...)` (in optimizer steps).

    Args:
        trainer: a Trainer with ``model_init`` and a :class:`MIRCallback`.
        objective: "mir", the value at the end of a trial, "mir_best", the lowest one after step 0, or "vision_gain" at
            the end of a trial. It decides better than MIR where recipes change the length of vision tokens, as learning
            rates do (docs/evidence.md).
        backend: "optuna" or "ray"; default: the first one that is installed.
        **options: of `Trainer.hyperparameter_search` (``hp_space``, ``n_trials``, ``hp_name``) and of the backend
            (``pruner``, ``sampler``, ``storage``; ``scheduler``, ``resources_per_trial``).

    Returns:
        The Trainer's `BestRun` on rank 0, None on other ranks.

    Raises:
        ConfigError: an option is invalid, or the study has values of another probe or root.

    Ranks: collective; the same arguments on every rank.

    Example:
        ```
        trainer = Trainer(model_init=make_model, args=args, train_dataset=dataset)
        MIRCallback(probe, processor=processor, every=50).attach(trainer)
        best = hyperparameter_search(
            trainer,
            hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)},
        )
        print(best.hyperparameters)
        ```
    """
    callback, backend = _checked(trainer, objective, backend, options)
    callback.attach(trainer)
    if backend == "optuna" and options.get("pruner") is None:  # Optuna's default would prune
        from optuna.pruners import NopPruner

        options["pruner"] = NopPruner()
    reporter = TrialReporter(trainer, callback, objective)
    trainer.add_callback(reporter)
    direction = "maximize" if objective == "vision_gain" else "minimize"
    try:
        return trainer.hyperparameter_search(
            compute_objective=reporter.current, direction=direction, backend=backend, **options
        )
    finally:
        trainer.remove_callback(reporter)


class TrialReporter(TrainerCallback):
    """Reports each evaluation of a trial to the backend, ends the trial if that prunes it, and sets the objective.

    It must come after the MIRCallback, to see the records of the same step. Its events are collective.
    """

    def __init__(self, trainer: Any, callback: MIRCallback, objective: str) -> None:
        self._trainer = trainer
        self._callback = callback
        self._objective = objective
        self._seen = 0
        self._pruned = False

    def current(self, metrics: Mapping[str, float] | None = None) -> float:
        """The objective so far, the same on all ranks; ``metrics``, of the Trainer, are ignored."""
        return _value_of(objective_record(self._callback.history, self._objective), self._objective)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start a trial."""
        self._seen, self._pruned = 0, False
        self._report(args)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Report new evaluations; end the trial on all ranks if the backend prunes it."""
        self._report(args)
        control.should_training_stop = control.should_training_stop or self._pruned
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the Trainer's objective.

        TrialPruned is raised only here, on rank 0, which runs the study: earlier, other ranks would train on.
        """
        self._report(args)
        value = self._trainer.objective = self.current()
        if self._backend() == "ray" and math.isnan(value):
            _report_to_ray({"objective": value, "step": state.global_step})  # else an earlier report would count
        if self._pruned and distributed.is_main():
            import optuna

            raise optuna.TrialPruned(f"pruned at step {state.global_step}, {self._objective} {value:.4f}")

    def _backend(self) -> str:
        return str(getattr(self._trainer.hp_search_backend, "value", self._trainer.hp_search_backend))

    def _report(self, args: TrainingArguments) -> None:
        history, start = self._callback.history, self._seen
        self._seen = len(history)
        for count in range(start + 1, len(history) + 1):
            newest, chosen = history[count - 1], objective_record(history[:count], self._objective)
            if chosen is None:
                continue
            # If the Trainer evaluates during training, it reports `current` to the backend itself.
            due = newest.is_after_start and not _evaluates(args)
            value = _value_of(chosen, self._objective)
            if self._backend() == "optuna":
                folder, reported = run_folder(self._trainer, args), value if due else None
                self._pruned |= _report_to_optuna(self._trainer._trial, newest, chosen, folder, reported)
            elif due:
                _report_to_ray({"objective": value, "mir": newest.mir, "step": newest.step})


def objective_record(history: Sequence[EvalRecord], objective: str) -> EvalRecord | None:
    """The record that has the objective; None if the newest evaluation failed or there is none."""
    if not history or history[-1].mir is None:
        return None
    return (lowest_record(history) if objective == "mir_best" else None) or history[-1]


def _value_of(record: EvalRecord | None, objective: str) -> float:
    """The objective of a record; NaN if it has none."""
    value = None if record is None else record.vision_gain if objective == "vision_gain" else record.mir
    return math.nan if value is None else value


def _checked(trainer: Any, objective: str, backend: str | None, options: Mapping[str, Any]) -> tuple[MIRCallback, str]:
    """The Trainer's MIRCallback and the backend; ConfigError if an option is invalid."""
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    for name, instead in _OURS.items():
        if name in options:
            raise ConfigError(f"Leave out {name}={options[name]!r}: {instead}.")
    callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", [])
    found = [callback for callback in callbacks if isinstance(callback, MIRCallback)]
    if len(found) != 1:
        raise ConfigError(
            f"The search needs a transformers Trainer with one MIRCallback, got a {type(trainer).__name__} with "
            f"{len(found)}. Call MIRCallback(probe, ...).attach(trainer) first."
        )
    if objective == "vision_gain" and not found[0].config.vision_gain:
        raise ConfigError("objective='vision_gain' needs MIRCallback(..., vision_gain=True).")
    if getattr(trainer, "model_init", None) is None:
        raise ConfigError(
            "The Trainer has no model_init, which makes a new model for each trial. Pass it to the Trainer."
        )
    if backend is None:
        from transformers.hyperparameter_search import default_hp_search_backend

        backend = default_hp_search_backend()
    backend = str(getattr(backend, "value", backend))
    if backend not in BACKENDS:
        raise ConfigError(
            f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}. For wandb sweeps see docs/comparing.md."
        )
    if options.get("pruner") is not None and distributed.world_size() > 1 and _evaluates(trainer.args):
        raise ConfigError(
            f"Pruning on several ranks needs eval_strategy='no', got {trainer.args.eval_strategy}: at its own "
            "evaluations the Trainer ends a trial on rank 0 only, and the other ranks hang."
        )
    return found[0], backend


def _evaluates(args: Any) -> bool:
    """Whether the Trainer evaluates during training; transformers 4.41 renamed the option."""
    strategy = getattr(args, "eval_strategy", None) or getattr(args, "evaluation_strategy", "no")
    return str(getattr(strategy, "value", strategy)) != "no"


def _report_to_optuna(trial: Any, newest: EvalRecord, chosen: EvalRecord, folder: str, value: float | None) -> bool:
    """Set a trial's user attributes, report the objective unless it is None, and return whether to prune. Collective.

    Only rank 0's trial belongs to a study. ``newest`` is the last record, ``chosen`` the one with the objective.
    """
    pruned = False
    with distributed.fail_together():
        if distributed.is_main():
            definition = {field: read_definition(newest, field) for field in DEFINITION_FIELDS}
            _check_study(trial, definition)
            attributes = {"mir_definition": definition, "mir_folder": folder, "mir_se": chosen.mir_se}
            for name, attribute in attributes.items():
                trial.set_user_attr(name, attribute)
            if value is not None:
                trial.report(value, newest.step)
                pruned = trial.should_prune()
    return distributed.broadcast_object(pruned)


def _check_study(trial: Any, definition: Mapping[str, str]) -> None:
    """Refuse a study (of a storage) that has values of another probe or root."""
    for other in trial.study.get_trials(deepcopy=False):
        known = other.user_attrs.get("mir_definition")
        if known is not None and {field: read_definition(known, field) for field in definition} != definition:
            raise ConfigError(
                f"Study {trial.study.study_name!r} has values measured differently: trial {trial.number} with "
                f"{definition}, trial {other.number} with {known}. Use the same probe, processor and root, or another "
                "study_name."
            )


def _report_to_ray(metrics: dict[str, Any]) -> None:
    import ray.tune

    ray.tune.report(metrics)
