# SPDX-License-Identifier: Apache-2.0
"""The Trainer callback: turns Trainer events into evaluations. It owns no maths."""

from __future__ import annotations

import math
import time
import warnings
from contextlib import suppress
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mir_callback import collectives
from mir_callback.errors import ConfigError
from mir_callback.evaluation import DEFAULT_BATCH_SIZE, adapter_for, encode_for, evaluate_encoded
from mir_callback.metric.frechet import check_root
from mir_callback.probe.adapter import Adapter
from mir_callback.probe.batches import EncodedProbe, check_batch_size
from mir_callback.probe.huggingface import require_processor
from mir_callback.probe.samples import Probe
from mir_callback.training import trackers
from mir_callback.training.failures import FailurePolicy, Failures
from mir_callback.training.history import DEFINITION_FIELDS, History, Record
from mir_callback.training.plateau import PlateauRule, Verdict
from mir_callback.training.schedule import check_every, is_due
from mir_callback.training.watchdog import DEFAULT_SECONDS, Tell, Watchdog

_UNATTACHED = (
    "[mir] this callback is not attached to the Trainer: values go to the history file and, if a run is active, "
    "directly to wandb. MIRCallback(...).attach(trainer) would send them through Trainer.log as well, to every "
    "reporter and to trainer.state.log_history."
)


_TWO_CALLBACKS = (
    "a Trainer must have one MIRCallback, got two; they would write one history file: train once for each probe, or "
    "compute the other's values from saved checkpoints with evaluate_mir"
)


class MIRCallback(TrainerCallback):
    """Compute MIR while a vision-language model trains, log it beside the loss, and stop on its plateau.

    Evaluations happen at the first step of the run, every ``every`` optimizer steps, and at the end. Training itself
    is not changed by them: losses and weights are the same to the last bit.

    Logged (the Trainer's reporters put `train/` before each):

    =================  ==================================================
    `mir`              log10 of the summed per-layer distances
    `mir_layer/NN`     distance of decoder layer NN, counted from 1
    `mir_seconds`      wall time of the evaluation
    =================  ==================================================

    Args:
        probe: the fixed samples; the same on every rank.
        every: optimizer steps between evaluations.
        stop: a rule that may end training, or None to watch only.
        processor: the model's processor; by default the Trainer's own (`processing_class`).
        adapter: for models that are not Hugging Face's own, see `llava_integration`.
        batch_size: probe samples per forward on each rank.
        root: "exact", or "paper_fast" to compare with values of the authors' fast mode.
        on_error: "warn": a failing first evaluation of a run ends it, later ones warn and training goes on; "raise":
            every one ends the run.
        max_failures: failed evaluations in a row after which there are no more; None for no limit.
        watchdog_seconds: a phase of an evaluation that lasts longer is reported by every rank with where it is stuck;
            None for no watchdog.
        abort_on_hang: end the process after such a report, with exit code 86.

    Raises:
        ConfigError: an option breaks its rule.

    Ranks: construct it on every rank with the same arguments.
    """

    def __init__(
        self,
        probe: Probe,
        every: int = 50,
        stop: PlateauRule | None = None,
        *,
        processor: Any = None,
        adapter: Adapter | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        root: str = "exact",
        on_error: str = "warn",
        max_failures: int | None = 3,
        watchdog_seconds: float | None = DEFAULT_SECONDS,
        abort_on_hang: bool = False,
    ) -> None:
        check_every(every)
        check_root(root)
        if not isinstance(probe, Probe):
            raise ConfigError(f"probe must be a Probe, got {type(probe).__name__}; see Probe.from_folders, Probe.load")
        check_batch_size(batch_size)
        if stop is not None and (isinstance(stop, type) or not callable(getattr(stop, "verdict", None))):
            raise ConfigError(f"stop must be None or a rule with verdict(history), got {stop!r}; use PlateauRule()")
        self.probe = probe
        self.every = every
        self.stop = stop
        self._processor = processor
        self._batch_size = batch_size
        self._root = root
        self._failures = Failures(FailurePolicy(on_error, max_failures))
        self._watchdog = Watchdog(watchdog_seconds, abort_on_hang)
        self._history = History()
        self._given_adapter = adapter
        self._adapter: Adapter | None = None
        self._encoded: EncodedProbe | None = None
        self._emit = trackers.guarded(trackers.to_wandb)
        self._attached = False
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
        self._emit = trackers.guarded(trackers.through_trainer(trainer))
        self._attached = True
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check everything, open the history and evaluate before the first step. Errors here end the run."""
        self._started = time.perf_counter()
        self._failures.reset()
        # Seen by another MIRCallback of this run; the next run, and a resumed one, have another state object.
        if vars(state).setdefault("_mir_callback", self) is not self:
            raise ConfigError(_TWO_CALLBACKS)
        with self._watchdog.over(f"start of MIR at step {state.global_step}", collectives.rank()) as tell:
            self._prepare(args, state, kwargs, tell)
        if not self._history.has_step(state.global_step):
            self._evaluate(state, kwargs["model"], kwargs.get("optimizer"))

    def _prepare(self, args: TrainingArguments, state: TrainerState, kwargs: dict[str, Any], tell: Tell) -> None:
        """Agree on the options, encode the probe, open the history; if one rank fails all do. Collective."""
        tell("comparing options with the other ranks")
        stop = repr(self.stop) if isinstance(self.stop, PlateauRule) else type(self.stop).__qualname__
        collectives.require_same(every=self.every, stop=stop, failure_policy=self._failures.policy)
        tell("encoding the probe")
        processor = self._processor or kwargs.get("processing_class") or kwargs.get("tokenizer")
        model = kwargs["model"]
        self._adapter = adapter_for(model, processor, self._given_adapter)
        self._encoded = encode_for(model, self.probe, self._adapter, batch_size=self._batch_size, root=self._root)
        tell("opening the history")
        self._history.open(args.output_dir or ".", state.global_step, self._definition())
        if not self._attached:
            _say(_UNATTACHED)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Evaluate if due, and stop training if the rule says so."""
        if is_due(state.global_step, self.every, ending=control.should_training_stop):
            verdict = self._evaluate(state, kwargs["model"], kwargs.get("optimizer"))
            if verdict is not None and verdict.stop:
                control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate the final weights if the last step has not been; not if other weights were loaded meanwhile."""
        if not self._history.has_step(state.global_step) and not args.load_best_model_at_end:
            self._evaluate(state, kwargs["model"], kwargs.get("optimizer"))

    def _definition(self) -> dict[str, str]:
        assert self._encoded is not None
        values = (self._encoded.fingerprint, self._encoded.tokens_fingerprint, self._root)
        return dict(zip(DEFINITION_FIELDS, values, strict=True))

    def _evaluate(self, state: TrainerState, model: nn.Module, optimizer: Any) -> Verdict | None:
        """One evaluation, its record, its log lines and the verdict on the history so far. Collective."""
        if self._failures.disabled:
            return None
        with self._watchdog.over(f"evaluation at step {state.global_step}", collectives.rank()) as tell:
            return self._evaluate_watched(state, model, optimizer, tell)

    def _evaluate_watched(self, state: TrainerState, model: nn.Module, optimizer: Any, tell: Tell) -> Verdict | None:
        record: Record = {"step": state.global_step, "epoch": state.epoch}
        record |= self._measure(model, optimizer, state.global_step, tell)
        record |= self._failures.count(record["mir"] is None, record.get("error"))
        tell("verdict of the stop rule")
        verdict = self._judge([*self.history, record])
        record |= {"verdict": verdict.kind, "reason": verdict.reason} if verdict else {"verdict": None, "reason": None}
        record |= {"elapsed": time.perf_counter() - self._started, "time": time.time()}
        tell("writing the history")
        try:
            self._history.append(record)
        except (OSError, TypeError, ValueError) as error:
            warnings.warn(f"step {state.global_step}: MIR could not be written to disk: {error}", stacklevel=2)
        tell("logging")
        values = trackers.log_values(record)
        if values:
            self._emit(values, state.global_step)
        _say(_console_line(record, verdict))
        if "disabled" in record:
            _say(f"[mir] step {state.global_step}: {record['disabled']}")
        return verdict

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


def _console_line(record: Record, verdict: Verdict | None) -> str:
    if record["mir"] is None:
        return f"[mir] step {record['step']}: evaluation FAILED after {record['seconds']:.1f} s: {record['error']}"
    line = f"[mir] step {record['step']}: MIR {record['mir']:.4f} ({record['seconds']:.1f} s)"
    if verdict is None:
        return line
    if verdict.stop:
        return f"{line} {verdict.kind}; stopping training: {verdict.reason}"
    return f"{line} {verdict.kind}: {verdict.reason}" if verdict.kind == "no data" else f"{line} {verdict.kind}"


def _say(line: str) -> None:
    if collectives.is_main():
        with suppress(OSError):  # a full disk behind stdout, a closed pipe: there is nowhere to say it
            tqdm.write(line)
