# SPDX-License-Identifier: Apache-2.0
"""The Trainer callback: turns Trainer events into evaluations. It owns no maths."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Collection
from functools import partial
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mir_callback import collectives
from mir_callback.errors import ConfigError
from mir_callback.evaluation import DEFAULT_BATCH_SIZE, adapter_for, encode_for, evaluate_encoded
from mir_callback.metric.frechet import check_root
from mir_callback.probe.adapter import Adapter
from mir_callback.probe.batches import EncodedProbe, check_batch_size
from mir_callback.probe.huggingface import require_processor
from mir_callback.probe.samples import Probe
from mir_callback.training.checkpoint import EVAL_METRIC, BestModel, check_best_metric, chooses_by_mir, saver_for
from mir_callback.training.clock import Clock, pace_fields
from mir_callback.training.console import UNATTACHED, evaluation_line, held_line, say
from mir_callback.training.events import DEFAULT_EVENTS, check_events, is_due_at_start
from mir_callback.training.failures import FailurePolicy, Failures
from mir_callback.training.history import (
    DEFINITION_FIELDS,
    History,
    Record,
    changed_circumstances,
    since_last_stop,
    stopped,
)
from mir_callback.training.plateau import PlateauRule, Verdict
from mir_callback.training.rehearsal import DryRunDone, epochs_of, rehearse
from mir_callback.training.reports import Reports
from mir_callback.training.schedule import Moment, Schedule, as_schedule, describe
from mir_callback.training.watchdog import DEFAULT_SECONDS, Tell, Watchdog


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
    =================  ==================================================

    Args:
        probe: the fixed samples; the same on every rank.
        every: optimizer steps between evaluations, or a schedule: EveryEpochs, AtSteps, LogSpaced, TimeShare.
        stop: a rule that may end training, or None to watch only.
        processor: the model's processor; by default the Trainer's own (`processing_class`).
        adapter: for models that are not Hugging Face's own, see `llava_integration`.
        batch_size: probe samples per forward on each rank.
        root: "exact", or "paper_fast" to compare with values of the authors' fast mode.
        also_on: all events at which to evaluate besides: "start" (before the first step), "end", "evaluate" (each
            evaluation of the Trainer's own), "save" (each checkpoint).
        dry_run: evaluate once before the first step, print what it cost and what ``every`` will, and end the script.
        on_error: "warn": a failing first evaluation of a run ends it, later ones warn and training goes on; "raise":
            every one ends the run.
        max_failures: failed evaluations in a row after which there are no more; None for no limit.
        watchdog_seconds: a phase of an evaluation that lasts longer is reported by every rank with where it is stuck;
            None for no watchdog.
        abort_on_hang: end the process after such a report, with exit code 86.
        keep_best: keep the weights with the lowest MIR in `<output_dir>/mir_best/`; needs :meth:`attach`.
        continue_after_stop: let a run go on that its rule has stopped and that is resumed there; the rule then judges
            the evaluations after that stop. By default it stays stopped.

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
        also_on: Collection[str] = DEFAULT_EVENTS,
        dry_run: bool = False,
        on_error: str = "warn",
        max_failures: int | None = 3,
        watchdog_seconds: float | None = DEFAULT_SECONDS,
        abort_on_hang: bool = False,
        keep_best: bool = False,
        continue_after_stop: bool = False,
    ) -> None:
        self._schedule = as_schedule(every)
        self._events = check_events(also_on)
        check_root(root)
        if not isinstance(probe, Probe):
            raise ConfigError(f"probe must be a Probe, got {type(probe).__name__}; see Probe.from_folders, Probe.load")
        check_batch_size(batch_size)
        if stop is not None and (isinstance(stop, type) or not callable(getattr(stop, "verdict", None))):
            raise ConfigError(f"stop must be None or a rule with verdict(history), got {stop!r}; use PlateauRule()")
        switches = {"dry_run": dry_run, "keep_best": keep_best, "continue_after_stop": continue_after_stop}
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise ConfigError(f"{name} must be True or False, got {value!r}")
        self.probe = probe
        self.every = every
        self.stop = stop
        self._processor = processor
        self._batch_size = batch_size
        self._root = root
        self._dry_run = dry_run
        self._keep_best = keep_best
        self._continue_after_stop = continue_after_stop
        self._given_adapter = adapter
        self._failures = Failures(FailurePolicy(on_error, max_failures))
        self._watchdog = Watchdog(watchdog_seconds, abort_on_hang)
        self._history = History()
        self._reports = Reports()
        self._clock = Clock()
        self._best: BestModel | None = None
        # Of a run: set when it begins.
        self._adapter: Adapter | None = None
        self._encoded: EncodedProbe | None = None
        self._training = False
        self._held = False  # resumed where the rule had stopped the run
        self._resumed_at: int | None = None  # number of records continued, until circumstances are compared
        self._before = Moment(0)
        self._started = 0.0

    @property
    def history(self) -> list[Record]:
        """Records of the evaluations so far, newest last; the lines of `<output_dir>/mir_history.jsonl`."""
        return self._history.records

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
        self._reports = Reports(trainer)
        if self._keep_best:
            self._best = BestModel(saver_for(trainer, self._given_adapter))
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check everything, open the history and evaluate before the first step. Errors here end the run."""
        self._started = time.perf_counter()
        self._failures.reset()
        _claim(state, self)
        with self._watchdog.over(f"start of MIR at step {state.global_step}", collectives.rank()) as tell:
            self._prepare(args, kwargs, tell)
            if self._dry_run:
                tell("dry run")
                self._rehearse(args, state, kwargs)
            tell("opening the history")
            self._open(args, state)
        self._held = self.stop is not None and not self._continue_after_stop and stopped(self.history)
        if self._held:
            control.should_training_stop = True
            say(held_line(self.history[-1]))
        elif is_due_at_start(self._schedule, self._events, self._before, self.history):
            self._evaluate_once(state, control, kwargs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Evaluate if due, and stop training if the rule says so."""
        self._clock.follow(self._schedule, state.global_step)
        now, before = self._moment(state), self._before
        self._before = now
        if self._schedule.is_due(now, before) or ("end" in self._events and control.should_training_stop):
            self._evaluate_once(state, control, kwargs)
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
            self._evaluate_once(state, control, kwargs)
        value = self.history[-1]["mir"] if self._training and self._history.has_step(state.global_step) else None
        if metrics is not None and self._training and (value is not None or chosen):
            metrics[EVAL_METRIC] = math.nan if value is None else value
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Evaluate the weights of a checkpoint, if asked to."""
        if self._training and "save" in self._events:
            self._evaluate_once(state, control, kwargs)
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate the final weights if the last step has not been; not if other weights were loaded meanwhile."""
        if "end" in self._events and not args.load_best_model_at_end:
            self._evaluate_once(state, control, kwargs)
        self._training = False

    def _prepare(self, args: TrainingArguments, kwargs: dict[str, Any], tell: Tell) -> None:
        """Agree on the options and encode the probe; if one rank fails all do. Collective."""
        tell("comparing options with the other ranks")
        stop = repr(self.stop) if isinstance(self.stop, PlateauRule) else type(self.stop).__qualname__
        collectives.require_same(
            every=describe(self._schedule),
            also_on=self._events,
            stop=stop,
            failure_policy=self._failures.policy,
            keep_best=self._keep_best,
            dry_run=self._dry_run,
        )
        check_best_metric(args)
        if self._keep_best and self._best is None:
            raise ConfigError(
                "keep_best needs the Trainer, which knows how to save its model: the callback must be attached, got "
                "one that is not; use MIRCallback(..., keep_best=True).attach(trainer)"
            )
        tell("encoding the probe")
        processor = self._processor or kwargs.get("processing_class") or kwargs.get("tokenizer")
        model = kwargs["model"]
        self._adapter = adapter_for(model, processor, self._given_adapter)
        self._encoded = encode_for(model, self.probe, self._adapter, batch_size=self._batch_size, root=self._root)

    def _rehearse(self, args: TrainingArguments, state: TrainerState, kwargs: dict[str, Any]) -> None:
        """Evaluate once, say what it cost, and end the script. Collective."""
        assert self._encoded is not None
        assert self._adapter is not None
        epochs = epochs_of(state.max_steps, kwargs.get("train_dataloader"), args.gradient_accumulation_steps)
        evaluate = partial(evaluate_encoded, kwargs["model"], self._encoded, self._adapter, root=self._root)
        evaluate = partial(evaluate, optimizer=kwargs.get("optimizer"))
        say(rehearse(evaluate, self._schedule, self._events, state.max_steps, epochs))
        raise DryRunDone

    def _open(self, args: TrainingArguments, state: TrainerState) -> None:
        """Start or continue the history, and what depends on it. Collective."""
        folder = args.output_dir or "."
        self._history.open(folder, state.global_step, self._definition())
        self._clock.begin(state.global_step, self.history)
        self._before, self._training, self._resumed_at = self._moment(state), True, len(self.history)
        if not self._reports.attached:
            say(UNATTACHED)
        if self._best is not None:
            for line in self._best.open(folder, self.history, self._definition()):
                say(f"[mir] {line}")

    def _moment(self, state: TrainerState) -> Moment:
        return Moment(state.global_step, state.epoch or 0.0, self._clock.pace)

    def _definition(self) -> dict[str, str]:
        assert self._encoded is not None
        values = (self._encoded.fingerprint, self._encoded.tokens_fingerprint, self._root)
        return dict(zip(DEFINITION_FIELDS, values, strict=True))

    def _evaluate_once(self, state: TrainerState, control: TrainerControl, kwargs: dict[str, Any]) -> None:
        """Evaluate unless this step has been, the run is held or there were too many failures. Collective."""
        if self._held or self._failures.disabled or self._history.has_step(state.global_step):
            return
        with (
            self._clock.evaluating(),
            self._watchdog.over(f"evaluation at step {state.global_step}", collectives.rank()) as tell,
        ):
            verdict = self._evaluate(state, kwargs["model"], kwargs.get("optimizer"), tell)
        if verdict is not None and verdict.stop:
            control.should_training_stop = True

    def _evaluate(self, state: TrainerState, model: nn.Module, optimizer: Any, tell: Tell) -> Verdict | None:
        """One evaluation, its record, its log lines and the verdict on the history so far. Collective."""
        record: Record = {"step": state.global_step, "epoch": state.epoch}
        record |= self._measure(model, optimizer, state.global_step, tell)
        record |= self._failures.count(record["mir"] is None, record.get("error"))
        tell("verdict of the stop rule")
        verdict = self._judge([*since_last_stop(self.history), record])
        record |= {"verdict": verdict.kind, "reason": verdict.reason} if verdict else {"verdict": None, "reason": None}
        record |= {"elapsed": time.perf_counter() - self._started, "time": time.time()}
        record |= pace_fields(self._clock.share(state.global_step))
        tell("writing the history")
        try:
            self._history.append(record)
        except (OSError, TypeError, ValueError) as error:
            warnings.warn(f"step {state.global_step}: MIR could not be written to disk: {error}", stacklevel=2)
        tell("logging")
        options = {"every": describe(self._schedule), "also_on": ", ".join(self._events), "stop": repr(self.stop)}
        self._reports.send(record, self.history, options)
        say(evaluation_line(record, verdict))
        if "disabled" in record:
            say(f"[mir] step {state.global_step}: {record['disabled']}")
        tell("keeping the best model")
        self._after_record(record)
        return verdict

    def _after_record(self, record: Record) -> None:
        """Once in a resumed run say what is measured otherwise than before; keep the weights if they are the best."""
        if self._resumed_at is not None and record["mir"] is not None:
            told = changed_circumstances(self.history[: self._resumed_at], record)
            self._resumed_at = None
            if told and collectives.is_main():
                warnings.warn(told, stacklevel=2)
        told = self._best.offer(record) if self._best is not None else None
        if told:
            say(f"[mir] {told}")

    def _measure(self, model: nn.Module, optimizer: Any, step: int, tell: Tell) -> Record:
        """The fields of a record that come from the model; `mir` None where a tolerated evaluation failed."""
        if self._encoded is None or self._adapter is None:
            raise ConfigError(
                "MIRCallback must be added before training begins, got its first event in the middle of a run; "
                "attach it before trainer.train()"
            )
        started = time.perf_counter()
        try:
            report = evaluate_encoded(
                model, self._encoded, self._adapter, root=self._root, optimizer=optimizer, tell=tell
            )
        except Exception as error:
            # A failure that only this rank has would leave it out of step with the others: better to end loudly.
            tolerated = self._failures.policy.tolerates(first=not self._history.records)
            if not tolerated or not collectives.is_shared(error):
                raise
            warnings.warn(f"step {step}: MIR evaluation failed, training goes on: {error}", stacklevel=2)
            failed = {"seconds": time.perf_counter() - started, "error": collectives.describe(error)}
            return {"mir": None, "per_layer": None, **failed, **self._definition()}
        fields = report.as_dict()
        if not math.isfinite(report.mir):
            fields |= {"mir": None, "error": "every distance is zero: vision and text tokens cannot be told apart"}
        return fields

    def _judge(self, history: list[Record]) -> Verdict | None:
        """Rank 0 decides, all ranks obey; None without a rule. A rule that fails does not end training."""
        if self.stop is None:
            return None
        verdict = Verdict("no data", "another rank decides")
        if collectives.is_main():
            try:
                verdict = self.stop.verdict(history)
                if not isinstance(verdict, Verdict):
                    raise ConfigError(f"stop.verdict(history) must return a Verdict, got {verdict!r}")
            except Exception as error:
                warnings.warn(f"the stop rule failed, training goes on: {type(error).__name__}: {error}", stacklevel=2)
                verdict = Verdict("no data", f"the stop rule failed: {type(error).__name__}: {error}")
        return collectives.broadcast_object(verdict)


def _claim(state: TrainerState, callback: MIRCallback) -> None:
    """Refuse a second MIRCallback in one run: both are handed the same state, which is made anew for each run.

    What is put on a state beside its own fields is not saved with it.
    """
    if vars(state).setdefault("_mir_callback", id(callback)) != id(callback):
        raise ConfigError(
            "a Trainer must have one MIRCallback, got a second one; both would write one history file: remove one of "
            "them with trainer.remove_callback"
        )
