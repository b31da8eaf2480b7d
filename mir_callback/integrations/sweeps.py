# SPDX-License-Identifier: Apache-2.0
"""Hyperparameter searches by MIR, on the engines that a Trainer knows: Optuna and Ray Tune."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mir_callback import distributed
from mir_callback.errors import ConfigError
from mir_callback.integrations.huggingface import MIRCallback, run_folder
from mir_callback.record import DEFINITION_FIELDS, EvalRecord, lowest_record

OBJECTIVES = ("mir", "mir_best")
BACKENDS = ("optuna", "ray")
# What a search decides by itself, and what to say about it.
_OURS = {"compute_objective": "objective chooses between mir and mir_best", "direction": "lower MIR is better"}


def hyperparameter_search(trainer: Any, objective: str = "mir", *, backend: str | None = None, **options: Any) -> Any:
    """`Trainer.hyperparameter_search` with MIR as what is minimised; no evaluation data set is needed.

    Each trial has a history (and, with ``keep_best``, best weights) of its own, in the folder the Trainer gives the
    trial: `<output_dir>/run-0`, `run-1`, .... Each evaluation is reported to the engine, so that it can end trials
    early. A trial whose last evaluation failed counts as failed.

    Optuna's trials carry `mir_se`, `mir_folder` and `mir_definition` as user attributes; a study that is continued from
    a storage refuses values that were made otherwise. Trials are pruned only if a ``pruner`` other than None is given,
    since MIR may rise first and fall later: choose one that waits, such as `MedianPruner(n_warmup_steps=...)`, in
    optimizer steps.

    Args:
        trainer: made with ``model_init``, with a :class:`MIRCallback`.
        objective: "mir", the value at the end of a trial, or "mir_best", the lowest one after its first step.
        backend: "optuna" or "ray"; by default the first one that is installed.
        **options: of `Trainer.hyperparameter_search` (``hp_space``, ``n_trials``, ``hp_name``) and of the engine
            (``pruner``, ``sampler``, ``storage``; ``scheduler``, ``resources_per_trial``).

    Returns:
        What the Trainer returns: the `BestRun` on rank 0, None on others.

    Raises:
        ConfigError: an option breaks its rule, or a study holds values that were made otherwise.

    Ranks: all, with the same arguments.
    """
    callback, backend = _checked(trainer, objective, backend, options)
    callback.attach(trainer)
    if backend == "optuna" and options.get("pruner") is None:  # None would be Optuna's own default, which prunes
        from optuna.pruners import NopPruner

        options["pruner"] = NopPruner()
    reporter = TrialReporter(trainer, callback, objective)
    trainer.add_callback(reporter)
    try:
        return trainer.hyperparameter_search(
            compute_objective=reporter.current, direction="minimize", backend=backend, **options
        )
    finally:
        trainer.remove_callback(reporter)


class TrialReporter(TrainerCallback):
    """Tells the engine of a search each MIR of a trial, ends the trial if it says so, and leaves the objective.

    It comes after the MIRCallback, whose records of a step it then sees. Its events are collective.
    """

    def __init__(self, trainer: Any, callback: MIRCallback, objective: str) -> None:
        self._trainer = trainer
        self._callback = callback
        self._objective = objective
        self._seen = 0
        self._pruned = False

    def current(self, metrics: Mapping[str, float] | None = None) -> float:
        """The objective as it stands, the same on all ranks; the Trainer's own ``metrics`` are not looked at."""
        record = objective_record(self._callback.history, self._objective)
        return math.nan if record is None or record.mir is None else record.mir

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A trial begins."""
        self._seen, self._pruned = 0, False
        self._report(args)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Report what has been measured since; end the trial on all ranks if the engine prunes it."""
        self._report(args)
        control.should_training_stop = control.should_training_stop or self._pruned
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the objective where the engine looks for it.

        A pruned trial ends like any other on all ranks, and only then is it made known by rank 0, which alone runs the
        study: raised any earlier, the other ranks would train on without it.
        """
        self._report(args)
        value = self._trainer.objective = self.current()
        if self._backend() == "ray" and math.isnan(value):
            _tell_ray({"objective": value, "step": state.global_step})  # else an earlier step's report would stand
        if self._pruned and distributed.is_main():
            import optuna

            raise optuna.TrialPruned(f"pruned at step {state.global_step}, MIR {value:.4f}")

    def _backend(self) -> str:
        return str(getattr(self._trainer.hp_search_backend, "value", self._trainer.hp_search_backend))

    def _report(self, args: TrainingArguments) -> None:
        history, start = self._callback.history, self._seen
        self._seen = len(history)
        for count in range(start + 1, len(history) + 1):
            newest, chosen = history[count - 1], objective_record(history[:count], self._objective)
            if chosen is None:
                continue
            # Where the Trainer evaluates during training, it reports to the engine itself, with `current`.
            due = newest.is_trained and not _evaluates(args)
            if self._backend() == "optuna":
                folder = run_folder(self._trainer, args)
                self._pruned |= _tell_optuna(self._trainer._trial, newest, chosen, folder, report=due)
            elif due:
                _tell_ray({"objective": chosen.mir, "mir": newest.mir, "step": newest.step})


def objective_record(history: Sequence[EvalRecord], objective: str) -> EvalRecord | None:
    """The evaluation whose MIR is the objective of a trial; None where the newest one failed, or there is none."""
    if not history or history[-1].mir is None:
        return None
    return (lowest_record(history) if objective == "mir_best" else None) or history[-1]


def _checked(trainer: Any, objective: str, backend: str | None, options: Mapping[str, Any]) -> tuple[MIRCallback, str]:
    """The Trainer's MIRCallback and the engine's name."""
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    for name, instead in _OURS.items():
        if name in options:
            raise ConfigError(f"{name} must be left out of a search by MIR, got {options[name]!r}; {instead}")
    callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", [])
    found = [callback for callback in callbacks if isinstance(callback, MIRCallback)]
    if len(found) != 1:
        raise ConfigError(
            f"trainer must be a transformers Trainer with one MIRCallback, got {type(trainer).__name__} with "
            f"{len(found)}; use MIRCallback(probe, ...).attach(trainer) before the search"
        )
    if getattr(trainer, "model_init", None) is None:
        raise ConfigError("trainer must make a new model for each trial, got none: use Trainer(model_init=...)")
    if backend is None:
        from transformers.hyperparameter_search import default_hp_search_backend

        backend = default_hp_search_backend()
    backend = str(getattr(backend, "value", backend))
    if backend not in BACKENDS:
        raise ConfigError(
            f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}; for a wandb sweep see docs/comparing.md"
        )
    if options.get("pruner") is not None and distributed.world_size() > 1 and _evaluates(trainer.args):
        raise ConfigError(
            f'eval_strategy must be "no" to prune trials on several ranks, got {trainer.args.eval_strategy}: the '
            "Trainer would end a trial on rank 0 alone at its own evaluations, and the others would wait for ever"
        )
    return found[0], backend


def _evaluates(args: Any) -> bool:
    """Whether the Trainer evaluates while it trains, by the option's name before and after transformers 4.41."""
    strategy = getattr(args, "eval_strategy", None) or getattr(args, "evaluation_strategy", "no")
    return str(getattr(strategy, "value", strategy)) != "no"


def _tell_optuna(trial: Any, newest: EvalRecord, chosen: EvalRecord, folder: str, *, report: bool) -> bool:
    """Note how and where a trial's values are made, ``report`` the newest, and ask whether to end it. Collective.

    Only rank 0's trial belongs to a study. ``chosen`` is the record whose value is the objective so far.
    """
    pruned = False
    with distributed.fail_together():
        if distributed.is_main():
            definition = {field: newest[field] for field in DEFINITION_FIELDS}
            _check_study(trial, definition)
            attributes = {"mir_definition": definition, "mir_folder": folder, "mir_se": chosen.mir_se}
            for name, value in attributes.items():
                trial.set_user_attr(name, value)
            if report:
                trial.report(chosen.mir, newest.step)
                pruned = trial.should_prune()
    return distributed.broadcast_object(pruned)


def _check_study(trial: Any, definition: Mapping[str, str]) -> None:
    """Refuse to mix values of another probe or root into a study, such as one continued from a storage."""
    for other in trial.study.get_trials(deepcopy=False):
        known = other.user_attrs.get("mir_definition")
        if known is not None and known != definition:
            raise ConfigError(
                f"all trials of study {trial.study.study_name!r} must be measured alike, got {definition} in trial "
                f"{trial.number} but {known} in trial {other.number}; use the same probe, processor and root, or "
                "another study_name"
            )


def _tell_ray(metrics: dict[str, Any]) -> None:
    import ray.tune

    ray.tune.report(metrics)
