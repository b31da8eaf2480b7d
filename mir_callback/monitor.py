# SPDX-License-Identifier: Apache-2.0
"""One monitored run: is an evaluation due? Evaluate, apply the stop rule, record, log, keep the best, decide.

Knows no Trainer: integrations/ turns the events of one into calls of :class:`MIRMonitor`.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from mir_callback import distributed
from mir_callback.arguments import check_seed, check_status, check_whole, finite_or_none
from mir_callback.best_model import BestModel, WeightSaver, default_saver
from mir_callback.clock import Clock
from mir_callback.config import MIRConfig, with_options
from mir_callback.console import dry_run_lines, evaluation_line, start_notes
from mir_callback.early_stopping import Verdict
from mir_callback.errors import ConfigError, ProbeError
from mir_callback.evaluation.evaluate import Evaluator
from mir_callback.history import FILE_NAME, History
from mir_callback.loggers import Loggers
from mir_callback.lr_schedule import find_drops, learning_rate_of, next_drop, next_epoch
from mir_callback.model.isolation import evaluation_weights
from mir_callback.probe.adapters import Adapter, find_adapter
from mir_callback.probe.probe import Probe
from mir_callback.probe.storage import RUN_PROBE
from mir_callback.record import (
    EvalRecord,
    changed_circumstances,
    explain_jumps,
    is_newly_contradicted,
    is_stopped,
    since_last_stop,
)
from mir_callback.schedule import EveryEpochs, TrainingProgress, is_due_at_start
from mir_callback.second_opinion import find_contradiction
from mir_callback.watchdog import enter_phase, watchdog

_log = logging.getLogger(__name__)

# What DDP and DeepSpeed, torch.compile, FSDP and recomputing wrappers add to the names of parameters.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class Decision:
    """The answer of :meth:`MIRMonitor.step`; the same on every rank.

    Attributes:
        stop: training should end.
        record: the evaluation of this step, None if none was due.

    Example:
        >>> Decision().stop
        False
    """

    stop: bool = False
    record: EvalRecord | None = None


class DryRunDone(SystemExit):
    """Ends the script after a dry run, with exit code 0, before it can train or save anything."""

    def __init__(self) -> None:
        super().__init__(0)


class MIRMonitor:
    """Evaluate MIR in a training loop of any kind: plain PyTorch, Accelerate, your own.

    Construction checks everything, opens `<output_dir>/mir_history.jsonl` and evaluates before the first step. Training
    does not change: losses and weights are the same to the last bit.

    If the loop's forwards run under `torch.autocast`, construct and call the monitor under the same. Wrappers that
    autocast themselves (Accelerate's) need nothing.

    Args:
        model: the model that is trained, bare or wrapped (DDP, DeepSpeed engine, PEFT).
        probe: the fixed samples; the same on every rank.
        processor: the model's processor (image processor and tokenizer); not needed with an adapter.
        adapter: for models that no registered adapter knows, see `mir_callback.probe.adapters`.
        optimizer: of the run; ZeRO-3 with a bare model and schedule-free optimizers need it.
        lr_scheduler: of the run, stepped once an optimizer step; the stop rule waits for a drop that it plans.
        output_dir: where history, probe and best weights go; a folder of its own for each run.
        total_steps: planned optimizer steps; a stop rule looks ahead by a fraction of them.
        total_epochs: planned epochs; the stop rule waits for the last one.
        start_step: 0, or the step of the checkpoint that training resumes from: the history is then continued.
        start_status: keyword arguments that :meth:`step` would get there (epoch, loss, samples_seen, ...).
        log: where values go besides an active wandb run: a function of (values, step), an object with `add_scalar`
            (TensorBoard) or with `log(values, step=...)` (Accelerate, Fabric).
        seed: of the run; records have it, and `mir compare` pairs runs by it. Of rank 0, if ranks have different ones.
        data_seed: of the order of the data, if it has one of its own.
        save_weights: writes the weights into an empty folder, called on every rank; for ``keep_best``. The default is
            `model.save_pretrained`, if each rank holds the whole model or FSDP2 can gather it on rank 0.
        **options: of :class:`MIRConfig`.

    Attributes:
        config: the options.
        is_already_stopped: the run was resumed where its stop rule had ended it. Nothing is evaluated, and the first
            :meth:`step` returns stop; read :attr:`should_stop` before the loop to train no step.

    Raises:
        MIRError: an option, the probe, the model or the history is not usable; on every rank, before any forward.
        DryRunDone: with ``dry_run``, after one evaluation; ends the script.

    Ranks: collective, construction and all methods.

    Example:
        ```
        monitor = MIRMonitor(model, probe, processor=processor, optimizer=optimizer, output_dir="runs/a",
                             total_steps=2000, every=50, stop=PlateauRule())
        for step, batch in enumerate(loader, start=1):
            ...
            optimizer.step()
            if monitor.step(step, loss=loss).stop:  # every rank
                break
        monitor.close()
        ```
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        *,
        processor: Any = None,
        adapter: Adapter | None = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        output_dir: str | Path = ".",
        total_steps: int | None = None,
        total_epochs: float | None = None,
        start_step: int = 0,
        start_status: Mapping[str, Any] | None = None,
        log: Any = None,
        seed: int | None = None,
        data_seed: int | None = None,
        save_weights: WeightSaver | None = None,
        **options: Any,
    ) -> None:
        with distributed.fail_together():
            self.config = MIRConfig.from_options(options)
            start_step = check_whole("start_step", start_step)
            if total_steps is not None:
                total_steps = check_whole("total_steps", total_steps)
            check_status(start_status or {})
            self._seeds = {"seed": check_seed("seed", seed), "data_seed": check_seed("data_seed", data_seed)}
            if start_step and isinstance(self.config.schedule, EveryEpochs) and "epoch" not in (start_status or {}):
                raise ConfigError("every=EveryEpochs(...) needs the epoch at start_step: start_status={'epoch': ...}")
        self._model, self._optimizer, self._total_steps = model, optimizer, total_steps
        self._history, self._clock = History(), Clock()
        self._started = time.perf_counter()
        self._failures_in_a_row = 0
        self._is_disabled = self._is_stopped = False
        self._status: dict[str, Any] = {"epoch": 0.0, "samples_seen": 0} if start_step == 0 else {}
        self._status |= start_status or {}
        with self._watched(f"start of MIR at step {start_step}"):
            enter_phase("comparing options with the other ranks")
            distributed.require_same(**self.config.described(), start_step=start_step, total_steps=total_steps)
            enter_phase("encoding the probe")
            with distributed.fail_together():
                if not isinstance(probe, Probe):
                    raise ConfigError(f"probe={probe!r:.60} is not a Probe: use Probe.from_folders or Probe.load")
                self._loggers = log if isinstance(log, Loggers) else Loggers(log, options=self.config.for_trackers())
                saver = (save_weights or default_saver(model, processor)) if self.config.keep_best else None
                adapter = find_adapter(model, processor, adapter=adapter, **self.config.encoding)
            self._evaluator = Evaluator(model, probe, adapter, self.config)
            self._total_epochs, self._drops = total_epochs, self._planned_drops(lr_scheduler)
            drops = [step for step in self._drops if step >= start_step]
            for note in start_notes(self.config, len(probe.samples), total_steps, total_epochs, drops):
                _log.info("NOTE: %s", note)
            if self._evaluator.first_sample is not None:
                _log.info("the first sample as the model gets it: %s", self._evaluator.first_sample)
            if self.config.dry_run:
                enter_phase("dry run")
                self._dry_run(total_epochs)
            enter_phase("opening the history")
            self._history.open(output_dir, start_step, self._evaluator.definition)
            self._probe_path = Path(output_dir) / RUN_PROBE
            if self.config.save_probe and distributed.is_main():
                _keep_probe(probe, self._probe_path)
            self._clock.begin(start_step, self.history)
            self._num_continued: int | None = len(self.history)  # until circumstances have been compared
            self._best = None
            if saver is not None:
                self._best = BestModel(saver, output_dir, self.history, self._evaluator.definition)
        self._now = TrainingProgress(start_step, self._status.get("epoch") or 0.0, self._clock.pace)
        stays = self.config.may_stop and not self.config.continue_after_stop
        self.is_already_stopped = stays and is_stopped(self.history)
        if self.is_already_stopped:
            _log.info(
                "this run was stopped on its plateau at step %d (%s) and stays stopped; to train on, pass "
                "continue_after_stop=True (--mir_continue_after_stop) or stop=None",
                *(self.history[-1].step, self.history[-1].reason),
            )
        elif is_due_at_start(self.config.schedule, self.config.also_on, self._now, self.history):
            self.evaluate()

    @property
    def history(self) -> list[EvalRecord]:
        """Records of the evaluations so far, newest last; the lines of `<output_dir>/mir_history.jsonl`."""
        return self._history.records

    @property
    def should_stop(self) -> bool:
        """Whether the stop rule has ended this run, now or before it was resumed."""
        return self._is_stopped or self.is_already_stopped

    def step(
        self,
        step: int,
        *,
        loss: Any = None,
        epoch: float | None = None,
        loss_step: int | None = None,
        samples_seen: int | None = None,
        tokens_seen: int | None = None,
    ) -> Decision:
        """Call it after each optimizer step: evaluates if due, and says whether to stop.

        Args:
            step: optimizer steps so far, counted through all epochs and restarts.
            loss: the newest training loss, a number or a one-element tensor; read only if an evaluation is due.
            epoch: epochs done, with fraction; needed by ``every=EveryEpochs(...)``.
            loss_step: the step of the loss, if not this one.
            samples_seen: training samples so far, over all ranks.
            tokens_seen: input tokens so far, over all ranks.

        Raises:
            ConfigError: a step below the last one, or no epoch for a schedule that counts epochs.
            Exception: of a failed evaluation, if it is not tolerated (``on_error``).

        Ranks: collective; the same step on every rank.
        """
        if epoch is None and isinstance(self.config.schedule, EveryEpochs):
            raise ConfigError("every=EveryEpochs(...) needs the epoch: monitor.step(step, epoch=...)")
        step = check_whole("step", step)
        if step < self._now.step:
            raise ConfigError(
                f"step {step} after step {self._now.step}: count optimizer steps over the whole run, through all "
                "epochs and restarts (start_step)"
            )
        if self._now.step == 0 and step > 1:
            _warn(
                f"the first step is {step}: if training resumes from a checkpoint, pass its step as start_step, so "
                "that the history is continued"
            )
        self._clock.follow(self.config.schedule, step)
        before, self._now = self._now, TrainingProgress(step, epoch or 0.0, self._clock.pace)
        seen = {"loss": loss, "loss_step": step if loss_step is None else loss_step}
        self._status = {"epoch": epoch, "samples_seen": samples_seen, "tokens_seen": tokens_seen, **seen}
        record = self.evaluate() if self.config.schedule.is_due(self._now, before) else None
        return Decision(self.should_stop, record)

    def evaluate(self) -> EvalRecord | None:
        """Evaluate the current weights, whatever the schedule says.

        Returns:
            The record; None if this step has one already, the run is stopped, or too many evaluations failed in a row.

        Ranks: collective.
        """
        step = self._now.step
        if self.should_stop or self._is_disabled or self._history.has_step(step):
            return None
        with self._watched(f"evaluation at step {step}"), self._clock.evaluating():
            record = replace(self._measure(step), **self._training_fields(), stage=stage_of(self._model))
            record = self._with_failures(record)
            enter_phase("verdict of the stop rule")
            verdict = self._judge(record) if distributed.is_main() else None
            record = replace(record, **verdict_fields(verdict), elapsed=time.perf_counter() - self._started)
            record = replace(record, time=time.time(), **self._clock.share(step).to_fields())
            record, damaged = record.checked()
            found = find_contradiction([*self.history, record])
            record = replace(record, contradiction=None if found is None else found.message)
            if damaged:
                _warn("; ".join(damaged))
            # Loss and clock differ between ranks: all of them return the record that rank 0 writes.
            stops = verdict is not None and bool(verdict.stop)
            record, self._is_stopped = distributed.broadcast_object((record, stops))
            self._keep(record, verdict)
        return record

    def close(self, *, evaluate: bool = True) -> Decision:
        """Call it when training has ended: evaluates the last step if it has not been, and uploads the files to wandb.

        It also frees the folder for another run.

        Args:
            evaluate: False if other weights have been loaded meanwhile.

        Ranks: collective.
        """
        record = self.evaluate() if evaluate and "end" in self.config.also_on else None
        self._write(self._history.close)
        self._loggers.close({FILE_NAME: self._history.path or Path(FILE_NAME), RUN_PROBE: self._probe_path})
        return Decision(self.should_stop, record)

    def _write(self, write: Callable[[], None]) -> None:
        """Write the records that are not on disk yet; a failure is tried again with the next record and at the end."""
        try:
            write()
        except (OSError, ValueError) as error:
            _log.warning("step %d: could not write MIR to disk: %s", self._now.step, error)

    @contextmanager
    def _watched(self, work: str) -> Iterator[None]:
        with watchdog(work, distributed.rank(), self.config.watchdog_seconds, abort=self.config.abort_on_hang):
            try:
                yield
            except BaseException:
                self._history.release()  # most likely the run is over; else the next record takes it again
                raise

    def _dry_run(self, total_epochs: float | None) -> None:
        report = self._evaluator.evaluate(self._model, optimizer=self._optimizer)
        for line in dry_run_lines(report, self.config, self._total_steps, total_epochs):
            _log.info(line)
        raise DryRunDone

    def _planned_drops(self, lr_scheduler: Any) -> list[int]:
        """Steps at which the learning rate will drop; a warning if a stop rule should know them and can't."""
        if lr_scheduler is None or not self._total_steps:
            return []
        why = "it is not one of torch's or transformers' with a known course"
        try:
            if (learning_rate := learning_rate_of(lr_scheduler)) is not None:
                return find_drops(learning_rate, self._total_steps)
        except Exception as error:  # a schedule may be anybody's code, and training does not depend on it
            why = f"{type(error).__name__}: {error}"
        if self.config.may_stop:
            _warn(
                f"could not read the learning-rate schedule {type(lr_scheduler).__name__} ahead ({why}): the stop rule "
                "does not wait for its drops"
            )
        return []

    def _measure(self, step: int) -> EvalRecord:
        """An evaluation; `mir` is None if it failed and that is tolerated."""
        started = time.perf_counter()
        try:
            report = self._evaluator.evaluate(self._model, optimizer=self._optimizer)
        except Exception as error:
            # A failure on this rank alone would leave it out of step with the others: better to end loudly.
            is_tolerated = self.config.on_error == "warn" and bool(self.history)
            if not is_tolerated or not distributed.is_shared(error):
                raise
            _warn(f"step {step}: MIR evaluation failed, training goes on: {error}")
            seconds, message = time.perf_counter() - started, distributed.describe(error)
            return EvalRecord(step=step, seconds=seconds, error=message, **self._evaluator.definition)
        return EvalRecord(step=step, **report.to_fields())

    def _training_fields(self) -> dict[str, Any]:
        """How far training has come, as fields of a record."""
        loss = finite_or_none(self._status.get("loss"))
        step = None if loss is None else self._status.get("loss_step")
        plan = {
            "max_steps": self._total_steps or None,
            "next_drop": next_drop(self._drops, self._now.step),
            "next_epoch": next_epoch(self._total_steps, self._total_epochs, self._now.step),
        }
        return {**self._status, "loss": loss, "loss_step": step, **self._seeds, **plan}

    def _with_failures(self, record: EvalRecord) -> EvalRecord:
        """Count failures in a row; after too many, disable evaluations."""
        limit = self.config.max_failures
        self._failures_in_a_row = self._failures_in_a_row + 1 if record.mir is None else 0
        self._is_disabled = limit is not None and self._failures_in_a_row >= limit
        if not self._is_disabled:
            return record
        message = (
            f"MIR is off until a restart, training goes on: {limit} evaluations in a row failed (max_failures), the "
            f"last with {record.error}"
        )
        return replace(record, disabled=message)

    def _judge(self, record: EvalRecord) -> Verdict | None:
        """The stop rule's verdict on the history and this record; None without a rule. A failing rule only warns."""
        rule = self.config.stop
        if rule is None:
            return None
        try:
            verdict = rule.verdict([*since_last_stop(self.history), record])
            if not isinstance(verdict, Verdict):
                raise TypeError(f"stop.verdict(records) returned {verdict!r:.60}, not a Verdict")
        except Exception as error:
            message = f"the stop rule failed: {type(error).__name__}: {error}"
            _log.warning("%s; training goes on", message)
            return Verdict("no data", message, summary="stop rule failed")
        return verdict

    def _keep(self, record: EvalRecord, verdict: Verdict | None) -> None:
        """Write the record, log it, and keep the weights if they are the best."""
        enter_phase("writing the history")
        self._history.records.append(record)
        self._write(self._history.write)
        enter_phase("logging")
        self._loggers.send(record, self.history)
        _log.info(evaluation_line(record, verdict, self.history[:-1]))
        if record.disabled is not None:
            _warn(f"step {record.step}: {record.disabled}")
        if self._num_continued is not None and record.mir is not None:
            changed = changed_circumstances(self.history[: self._num_continued], record)
            self._num_continued = None
            if changed:
                _warn(changed)
        jumps = explain_jumps(self.history[:-1], record)
        if jumps:
            _warn(jumps)
        if is_newly_contradicted(self.history[:-1], record):
            _warn(f"step {record.step}: {record.contradiction}")
        enter_phase("keeping the best model")
        if self._best is not None:
            with evaluation_weights(self._model, self._optimizer):  # those that were measured
                self._best.offer(record)


MIRMonitor.__init__ = with_options(MIRMonitor.__init__)  # type: ignore[method-assign]


def verdict_fields(verdict: Verdict | None) -> dict[str, Any]:
    """The fields of a record for a verdict.

    `verdict` "plateau" in a history means that the run was stopped. A rule that only observes leaves "going on" and
    sets `would_stop`. Ranks: pure.
    """
    if verdict is None:
        return {}
    is_observed = verdict.would_stop and not verdict.stop
    return {
        "verdict": "going on" if is_observed else verdict.kind,
        "reason": f"would stop, but only observes: {verdict.reason}" if is_observed else verdict.reason,
        "would_stop": verdict.would_stop,
        "expected_gain": verdict.expected_gain,
        "expected_gain_se": verdict.expected_gain_se,
    }


def _warn(message: str) -> None:
    """Warn on rank 0 of what all ranks know."""
    if distributed.is_main():
        _log.warning("%s", message)


def stage_of(model: nn.Module) -> str:
    """A fingerprint of the names of the trained parameters: it changes when others are trained. Ranks: pure.

    What the model is wrapped in makes no difference, so that a run may go on with one rank, or compiled.
    """
    trained = (name.split(".") for name, parameter in model.named_parameters() if parameter.requires_grad)
    names = sorted(".".join(part for part in parts if part not in _WRAPPERS) for parts in trained)
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


def _keep_probe(probe: Probe, path: Path) -> None:
    """Save the probe beside the history; training does not depend on it, so a failure is a warning."""
    try:
        probe.save(path)
    except ProbeError as error:
        _log.warning("could not save the probe beside the history: %s", error)
