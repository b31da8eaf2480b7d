# SPDX-License-Identifier: Apache-2.0
"""The Trainer callback: turns Trainer events into evaluations. It owns no maths."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mir_callback import distributed as collectives
from mir_callback.best_model import EVAL_METRIC, BestModel, check_best_metric, chooses_by_mir, saver_for
from mir_callback.dry_run import DryRunDone, epochs_of, rehearse
from mir_callback.early_stopping import PlateauRule
from mir_callback.errors import ConfigError
from mir_callback.evaluation.evaluate import DEFAULT_BATCH_SIZE, Wanted, adapter_for, encode_for, evaluate_encoded
from mir_callback.evaluation.memory import check_capture_budget
from mir_callback.failures import FailurePolicy
from mir_callback.history import Record, run_folder, stopped
from mir_callback.loggers import Reports, held_line, say
from mir_callback.metric.frechet import check_root
from mir_callback.monitor import Evaluations, How, Judge, keep_probe
from mir_callback.pending import check_solve
from mir_callback.probe.adapters import Adapter, require_processor
from mir_callback.probe.batches import check_batch_size
from mir_callback.probe.probe import Probe
from mir_callback.schedule import DEFAULT_EVENTS, Moment, Schedule, as_schedule, check_events, describe, is_due_at_start
from mir_callback.watchdog import DEFAULT_SECONDS, Tell, Watchdog


class MIRCallback(TrainerCallback):
    """Compute MIR while a vision-language model trains, log it beside the loss, and stop on its plateau.

    Evaluations happen before the first step, every ``every`` optimizer steps, and at the end. Training itself is not
    changed by them: losses and weights are the same to the last bit. A resumed run evaluates at the same steps as one
    in one go.

    Logged (the Trainer's reporters put `train/` before each):

    =================  ==================================================
    `mir`              log10 of the summed per-layer distances
    `mir_layer/NN`     distance of decoder layer NN, counted from 1
    `mir_seconds`      wall time of the evaluation
    `mir_best`         lowest MIR of the run so far
    `mir_best_step`    its step
    `mir_time_share`   part of the time so far that evaluations took
    `mir_se`           standard error of `mir` over draws of the probe's samples
    `mir_mean_share`   part of the distances that the means' gaps make; the rest is the covariances'
    `mir_norm_ratio`   mean vision norm over mean text norm, mean over layers
    `mir_cosine`       between the mean vision and the mean text token, mean over layers
    `mir_vision_rank`  effective rank of the vision tokens, mean over layers; `mir_text_rank` of the text tokens
    =================  ==================================================

    Args:
        probe: the fixed samples; the same on every rank.
        every: optimizer steps between evaluations, or a schedule: EveryEpochs, AtSteps, LogSpaced, TimeShare.
        stop: a rule that may end training, or None to watch only.
        processor: the model's processor; by default the Trainer's own (`processing_class`).
        adapter: for models that are not Hugging Face's own, see `llava_integration`.
        batch_size: probe samples per forward on each rank; halved on all if memory does not suffice.
        root: "exact", or "paper_fast" to compare with values of the authors' fast mode.
        standard_error: also find how far MIR would vary with other samples like the probe's (exact root only).
        bias_gauge: also find MIR with most of the bias of a finite probe removed, logged as `mir_extrapolated`.
        probe_loss: also find how well the model predicts the probe's texts, logged as `mir_probe_loss` and
            `mir_probe_perplexity`; takes the logits of all text positions.
        solve: "now", or "background": training goes on once the forwards and moments are done, the rest runs on a side
            thread, and the value is logged some steps later, under the step it belongs to. Not with ``keep_best``.
        capture_budget_gb: GB of token rows that may be kept on each rank's device, see `evaluate_mir`.
        also_on: all events at which to evaluate besides: "start" (before the first step), "end", "evaluate" (each
            evaluation of the Trainer's own), "save" (each checkpoint).
        dry_run: evaluate once before the first step, print what it cost and what ``every`` will, and end the script.
        on_error: "warn": a failing first evaluation of a run ends it, later ones warn and training goes on; "raise":
            every one ends the run.
        max_failures: failed evaluations in a row after which there are no more; None for no limit.
        watchdog_seconds: a phase of an evaluation that lasts longer is reported by every rank with where it is stuck;
            None for no watchdog.
        abort_on_hang: end the process after such a report, with exit code 86.
        save_probe: keep the probe as `<output_dir>/mir_probe.zip`, where `mir eval` and `mir report` look for it.
        keep_best: keep the weights with the lowest MIR in `<output_dir>/mir_best/`; needs :meth:`attach`.
        continue_after_stop: let a run go on that its rule has stopped and that is resumed there; the rule then judges
            the evaluations after that stop. By default it stays stopped, unless the rule only observes.

    Raises:
        ConfigError: an option breaks its rule.

    Ranks: construct it on every rank with the same arguments.
    """

    def __init__(
        self,
        probe: Probe,
        every: int | Schedule = 50,
        stop: PlateauRule | None = None,
        *,
        processor: Any = None,
        adapter: Adapter | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        root: str = "exact",
        standard_error: bool = True,
        bias_gauge: bool = False,
        probe_loss: bool = False,
        solve: str = "now",
        capture_budget_gb: float | None = None,
        also_on: Collection[str] = DEFAULT_EVENTS,
        dry_run: bool = False,
        on_error: str = "warn",
        max_failures: int | None = 3,
        watchdog_seconds: float | None = DEFAULT_SECONDS,
        abort_on_hang: bool = False,
        save_probe: bool = True,
        keep_best: bool = False,
        continue_after_stop: bool = False,
    ) -> None:
        self._schedule = as_schedule(every)
        self._events = check_events(also_on)
        check_root(root)
        check_capture_budget(capture_budget_gb)
        if not isinstance(probe, Probe):
            raise ConfigError(f"probe must be a Probe, got {type(probe).__name__}; see Probe.from_folders, Probe.load")
        check_batch_size(batch_size)
        judge = Judge(stop)
        switches = {"dry_run": dry_run, "keep_best": keep_best, "continue_after_stop": continue_after_stop}
        switches |= {"standard_error": standard_error, "bias_gauge": bias_gauge, "probe_loss": probe_loss}
        switches |= {"save_probe": save_probe}
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise ConfigError(f"{name} must be True or False, got {value!r}")
        check_solve(solve, keep_best=keep_best)
        self.probe = probe
        self.every = every
        self.stop = stop
        self._processor = processor
        self._batch_size = batch_size
        self._wanted = Wanted(root, standard_error, bias_gauge, probe_loss)
        self._solve = solve
        self._budget = capture_budget_gb
        self._dry_run = dry_run
        self._save_probe = save_probe
        self._keep_best = keep_best
        self._continue_after_stop = continue_after_stop
        self._given_adapter = adapter
        self._policy = FailurePolicy(on_error, max_failures)
        self._watchdog = Watchdog(watchdog_seconds, abort_on_hang)
        told = {"every": describe(self._schedule), "also_on": ", ".join(self._events), "stop": repr(stop)}
        self._run = Evaluations(How(self._wanted, solve, self._policy, self._watchdog, told), judge)
        self._folder: Callable[[TrainingArguments], str] = partial(run_folder, None)
        # Of a run: set when it begins.
        self._training = False
        self._before = Moment(0)

    @property
    def history(self) -> list[Record]:
        """Records of the evaluations so far, newest last; the lines of `<output_dir>/mir_history.jsonl`."""
        return self._run.history.records

    def attach(self, trainer: Any) -> MIRCallback:
        """Add this callback to a Trainer and log through it.

        Args:
            trainer: a transformers Trainer, before `train()`.

        Returns:
            This callback.

        Raises:
            ConfigError: not a Trainer, it has a MIRCallback already, or its processor cannot handle images.

        Ranks: every rank.
        """
        handler = getattr(trainer, "callback_handler", None)
        if handler is None:
            raise ConfigError(f"trainer must be a transformers Trainer, got {type(trainer).__name__}")
        others = [other for other in handler.callbacks if isinstance(other, MIRCallback) and other is not self]
        if others:
            raise ConfigError(
                f"trainer must have one MIRCallback, got {len(others)} already; they would write one history file: "
                "remove the other with trainer.remove_callback"
            )
        if self._given_adapter is None:
            found = getattr(trainer, "processing_class", None) or getattr(trainer, "tokenizer", None)
            require_processor(self._processor or found)
        if self not in handler.callbacks:
            trainer.add_callback(self)
        self._run.reports = Reports(trainer)
        self._folder = partial(run_folder, trainer)
        if self._keep_best:
            self._run.best = BestModel(saver_for(trainer, self._given_adapter))
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check everything, open the history and evaluate before the first step. Errors here end the run."""
        self._run.start()
        _claim(state, self)
        with self._watchdog.over(f"start of MIR at step {state.global_step}", collectives.rank()) as tell:
            self._prepare(args, kwargs, tell)
            if self._dry_run:
                tell("dry run")
                self._rehearse(args, state, kwargs)
            tell("opening the history")
            folder = self._folder(args)
            self._run.open(folder, args, state)
            if self._save_probe and collectives.is_main():
                keep_probe(self.probe, folder)
            self._before, self._training = self._moment(state), True
        stays = self._run.judge.may_stop and not self._continue_after_stop
        self._run.held = stays and stopped(self.history)
        if self._run.held:
            control.should_training_stop = True
            say(held_line(self.history[-1]))
        elif is_due_at_start(self._schedule, self._events, self._before, self.history):
            self._run.evaluate(state, control, kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Evaluate if due, and stop training if the rule says so."""
        self._run.clock.follow(self._schedule, state.global_step)
        now, before = self._moment(state), self._before
        self._before = now
        self._run.collect(state, control, wait=False)
        if self._schedule.is_due(now, before) or ("end" in self._events and control.should_training_stop):
            self._run.evaluate(state, control, kwargs)
        if control.should_save:  # a run resumed from this checkpoint must find the value in its history
            self._run.collect(state, control, wait=True)
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Put `eval_mir` among the metrics of the Trainer's own evaluation, so that it can choose checkpoints by it.

        The weights are measured now, unless they have been at this step, if that was asked for or the Trainer is to
        choose by MIR; where that fails `eval_mir` is NaN, which is never best.
        """
        metrics, chosen = kwargs.get("metrics"), chooses_by_mir(args)
        if self._training and (chosen or "evaluate" in self._events):
            self._run.evaluate(state, control, kwargs)
            self._run.collect(state, control, wait=True)
        value = self.history[-1]["mir"] if self._training and self._run.history.has_step(state.global_step) else None
        if metrics is not None and self._training and (value is not None or chosen):
            metrics[EVAL_METRIC] = math.nan if value is None else value
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Evaluate the weights of a checkpoint, if asked to."""
        if self._training and "save" in self._events:
            self._run.evaluate(state, control, kwargs)
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate the final weights if the last step has not been; not if other weights were loaded meanwhile."""
        if "end" in self._events and not args.load_best_model_at_end:
            self._run.evaluate(state, control, kwargs)
        self._run.collect(state, control, wait=True)
        self._training = False

    def _prepare(self, args: TrainingArguments, kwargs: dict[str, Any], tell: Tell) -> None:
        """Agree on the options and encode the probe; if one rank fails all do. Collective."""
        tell("comparing options with the other ranks")
        stop = repr(self.stop) if isinstance(self.stop, PlateauRule) else type(self.stop).__qualname__
        collectives.require_same(
            every=describe(self._schedule),
            also_on=self._events,
            stop=stop,
            observe_only=not self._run.judge.may_stop,
            continue_after_stop=self._continue_after_stop,
            failure_policy=self._policy,
            keep_best=self._keep_best,
            wanted=self._wanted,
            solve=self._solve,
            dry_run=self._dry_run,
        )
        check_best_metric(args)
        if self._keep_best and self._run.best is None:
            raise ConfigError(
                "keep_best needs the Trainer, which knows how to save its model: the callback must be attached, got "
                "one that is not; use MIRCallback(..., keep_best=True).attach(trainer)"
            )
        tell("encoding the probe")
        processor = self._processor or kwargs.get("processing_class") or kwargs.get("tokenizer")
        model = kwargs["model"]
        self._run.adapter = adapter_for(model, processor, self._given_adapter)
        self._run.encoded = encode_for(
            model,
            self.probe,
            self._run.adapter,
            batch_size=self._batch_size,
            wanted=self._wanted,
            capture_budget_gb=self._budget,
        )

    def _rehearse(self, args: TrainingArguments, state: TrainerState, kwargs: dict[str, Any]) -> None:
        """Evaluate once, say what it cost, and end the script. Collective."""
        run = self._run
        assert run.encoded is not None
        assert run.adapter is not None
        epochs = epochs_of(state.max_steps, kwargs.get("train_dataloader"), args.gradient_accumulation_steps)
        evaluate = partial(evaluate_encoded, kwargs["model"], run.encoded, run.adapter, wanted=self._wanted)
        evaluate = partial(evaluate, optimizer=kwargs.get("optimizer"))
        say(rehearse(evaluate, self._schedule, self._events, state.max_steps, epochs))
        raise DryRunDone

    def _moment(self, state: TrainerState) -> Moment:
        return Moment(state.global_step, state.epoch or 0.0, self._run.clock.pace)


def _claim(state: TrainerState, callback: MIRCallback) -> None:
    """Refuse a second MIRCallback in one run: both are handed the same state, which is made anew for each run.

    What is put on a state beside its own fields is not saved with it.
    """
    if vars(state).setdefault("_mir_callback", id(callback)) != id(callback):
        raise ConfigError(
            "a Trainer must have one MIRCallback, got a second one; both would write one history file: remove one of "
            "them with trainer.remove_callback"
        )
