# SPDX-License-Identifier: Apache-2.0
"""The evaluations of one run: begun, collected, judged, written down and logged. Decides neither when nor what."""

from __future__ import annotations

import hashlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from mir_callback import distributed as collectives
from mir_callback.best_model import BestModel
from mir_callback.clock import Clock, pace_fields
from mir_callback.early_stopping import Verdict
from mir_callback.errors import ConfigError, ProbeError
from mir_callback.evaluation.evaluate import Wanted, evaluate_beside, evaluate_encoded
from mir_callback.failures import FailurePolicy, Failures
from mir_callback.history import DEFINITION_FIELDS, History, Record, changed_circumstances, since_last_stop
from mir_callback.loggers import UNATTACHED, Reports, evaluation_line, say
from mir_callback.pending import Pending
from mir_callback.probe.adapters import Adapter
from mir_callback.probe.batches import EncodedProbe
from mir_callback.probe.probe import Probe
from mir_callback.probe.storage import RUN_PROBE
from mir_callback.watchdog import Tell, Watchdog


def progress_fields(args: TrainingArguments, state: TrainerState) -> Record:
    """What a record says of the run besides its step.

    Returns:
        `loss`: the training loss the Trainer logged last, None before the first one or if it was not finite.
        `loss_step`: the step it was logged at, as a rule before this record's: the Trainer logs after its callbacks.
        `tokens_seen`: input tokens so far on all ranks, None unless the Trainer counts them
        (`include_num_input_tokens_seen`).
        `samples_seen`: steps times the batch over all ranks, accumulation included; a batch that an epoch's end cuts
        short counts as a whole one.

    Ranks: each for itself, with the same result.
    """
    counted = getattr(args, "include_num_input_tokens_seen", False) not in (False, "no")
    on_each = getattr(state, "train_batch_size", None) or args.train_batch_size  # lowered by auto_find_batch_size
    batch = on_each * args.gradient_accumulation_steps * args.world_size
    newest = next((entry for entry in reversed(state.log_history) if "loss" in entry), {})
    known = "loss" in newest and math.isfinite(newest["loss"])
    return {
        "loss": newest["loss"] if known else None,
        "loss_step": newest.get("step") if known else None,
        "tokens_seen": int(state.num_input_tokens_seen) if counted else None,
        "samples_seen": state.global_step * batch,
    }


class Judge:
    """Asks a stop rule about every evaluation.

    Args:
        rule: with `verdict(history)`, or None to judge nothing; one whose `observe_only` is true never stops a run.

    Raises:
        ConfigError: not a rule.
    """

    def __init__(self, rule: Any) -> None:
        if rule is not None and (isinstance(rule, type) or not callable(getattr(rule, "verdict", None))):
            raise ConfigError(f"stop must be None or a rule with verdict(history), got {rule!r}; use PlateauRule()")
        self._rule = rule
        self._stages: dict[int, str] = {}  # by step, until its evaluation is concluded

    @property
    def may_stop(self) -> bool:
        """Whether there is a rule that may end training, and not one that only observes. Ranks: pure."""
        return self._rule is not None and not getattr(self._rule, "observe_only", False)

    def see(self, step: int, model: nn.Module) -> None:
        """Remember what is trained at a step that is going to be evaluated. Ranks: each for itself."""
        self._stages[step] = stage_of(model)

    def conclude(self, history: Sequence[Record], record: Record, max_steps: int) -> Verdict | None:
        """Judge an evaluation, and write into its record what was found and what later verdicts need.

        Args:
            history: the run's records before it.
            record: the evaluation; gets `stage`, `max_steps`, `verdict`, `reason`, `would_stop`, `expected_gain` and
                `expected_gain_se`.
            max_steps: planned length of the run.

        Returns:
            Rank 0's verdict; None without a rule. A rule that fails does not end training.

        Ranks: collective.
        """
        record["stage"] = self._stages.pop(record["step"], None)
        record["max_steps"] = max_steps if max_steps > 0 else None
        verdict = None if self._rule is None else self._ask(self._rule, [*since_last_stop(list(history)), record])
        record |= verdict_fields(verdict)
        return verdict

    def _ask(self, rule: Any, history: Sequence[Record]) -> Verdict:
        verdict = Verdict("no data", "another rank decides")
        if collectives.is_main():
            try:
                verdict = rule.verdict(history)
                if not isinstance(verdict, Verdict):
                    raise ConfigError(f"stop.verdict(history) must return a Verdict, got {verdict!r}")
            except Exception as error:
                warnings.warn(f"the stop rule failed, training goes on: {type(error).__name__}: {error}", stacklevel=2)
                verdict = Verdict("no data", f"the stop rule failed: {type(error).__name__}: {error}")
        return collectives.broadcast_object(verdict)


def verdict_fields(verdict: Verdict | None) -> Record:
    """What a record keeps of a verdict.

    `verdict` "plateau" in a history means a run that was stopped: one that is only observed goes on, and says in
    `would_stop` that it would not have. Ranks: pure.
    """
    if verdict is None:
        return {"verdict": None, "reason": None}
    watching = verdict.would_stop and not verdict.stop
    return {
        "verdict": "going on" if watching else verdict.kind,
        "reason": f"only observing, would stop: {verdict.reason}" if watching else verdict.reason,
        "would_stop": verdict.would_stop,
        "expected_gain": verdict.expected_gain,
        "expected_gain_se": verdict.expected_gain_se,
    }


def stage_of(model: nn.Module) -> str:
    """A fingerprint of which parameters are trained: it changes where a run begins to train others. Ranks: pure."""
    names = sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]


def keep_probe(probe: Probe, folder: str | Path) -> None:
    """Save the probe in a run's output folder, or say why it is not there: training does not depend on it.

    Ranks: rank 0 only.
    """
    try:
        probe.save(Path(folder) / RUN_PROBE)
    except ProbeError as error:
        warnings.warn(f"the probe is not kept beside the run: {error}", stacklevel=2)


@dataclass(frozen=True)
class How:
    """How all evaluations of a run are made.

    Attributes:
        wanted: what they find.
        solve: "now" or "background".
        policy: what failures lead to.
        watchdog: watches their phases.
        told: options of the callback, for the definition in the settings of trackers.
    """

    wanted: Wanted
    solve: str
    policy: FailurePolicy
    watchdog: Watchdog
    told: Mapping[str, str]


class Evaluations:
    """Makes evaluations when told to, at most one of a step, and keeps what becomes of them.

    Args:
        how: they are made.
        judge: of the run.

    Attributes:
        judge: as given.
        history: of the run.
        reports: where values are logged.
        clock: time of training and of evaluations.
        failures: of the run.
        best: keeps the best weights, or None.
        adapter: of the run's model; None before :meth:`open`, as the probe is.
        encoded: this rank's probe.
        held: whether the run was resumed where its rule had stopped it; nothing is evaluated then.

    Ranks: all methods are collective.
    """

    def __init__(self, how: How, judge: Judge) -> None:
        self._how = how
        self.judge = judge
        self.history = History()
        self.reports = Reports()
        self.clock = Clock()
        self.failures = Failures(how.policy)
        self.best: BestModel | None = None
        self.adapter: Adapter | None = None
        self.encoded: EncodedProbe | None = None
        self.held = False
        self._pending: Pending | None = None
        self._stopped = False  # by the rule, in this run
        self._progress: Callable[[TrainerState], Record] | None = None
        self._begun: Record = {}  # how far the run had come when the newest evaluation began
        self._resumed_at: int | None = None  # number of records continued, until circumstances are compared
        self._started = time.perf_counter()

    def start(self) -> None:
        """A run begins: the time that records count as elapsed, and failures, begin anew."""
        self._started = time.perf_counter()
        self.failures.reset()

    def open(self, folder: str, args: TrainingArguments, state: TrainerState) -> None:
        """Start or continue the history in ``folder``, and what depends on it; adapter and probe must be set."""
        self.history.open(folder, state.global_step, self.definition())
        records = self.history.records
        self.clock.begin(state.global_step, records)
        self._progress = partial(progress_fields, args)
        self._pending, self._stopped, self._resumed_at = None, False, len(records)
        self.reports.begin()
        if not self.reports.attached:
            say(UNATTACHED)
        if self.best is not None:
            for line in self.best.open(folder, records, self.definition()):
                say(f"[mir] {line}")

    def definition(self) -> dict[str, str]:
        """What makes the run's values comparable, by DEFINITION_FIELDS."""
        assert self.encoded is not None
        values = (self.encoded.fingerprint, self.encoded.tokens_fingerprint, self._how.wanted.root)
        return dict(zip(DEFINITION_FIELDS, values, strict=True))

    def evaluate(self, state: TrainerState, control: TrainerControl, kwargs: dict[str, Any]) -> None:
        """Evaluate unless this step has been, the run is held or there were too many failures. Collective."""
        step, model, optimizer = state.global_step, kwargs["model"], kwargs.get("optimizer")
        if self._is_enough(step):
            return
        self.collect(state, control, wait=True)
        if self._is_enough(step):
            return
        self._begun = self._progress(state) if self._progress else {}
        with self._evaluating(f"evaluation at step {step}") as tell:
            options = {"wanted": self._how.wanted, "optimizer": optimizer, "tell": tell}
            self.judge.see(step, model)
            fields = self._attempt(lambda: self._start(state, model, options), step)
            if fields is not None:
                self._conclude(state, control, {"step": step, "epoch": state.epoch} | fields, tell)

    def _is_enough(self, step: int) -> bool:
        """Whether no evaluation of this step is wanted."""
        begun = self._pending is not None and self._pending.step == step
        return begun or self.held or self._stopped or self.failures.disabled or self.history.has_step(step)

    def _start(self, state: TrainerState, model: nn.Module, options: dict[str, Any]) -> Record | None:
        """What a record says of an evaluation; None if it goes on beside training. Collective."""
        if self.encoded is None or self.adapter is None:
            raise ConfigError(
                "MIRCallback must be added before training begins, got its first event in the middle of a run; "
                "attach it before trainer.train()"
            )
        if self._how.solve == "now":
            return evaluate_encoded(model, self.encoded, self.adapter, **options).as_dict()
        begin = partial(evaluate_beside, model, self.encoded, self.adapter, **options)
        self._pending = Pending(state.global_step, state.epoch, begin)
        return None

    def collect(self, state: TrainerState, control: TrainerControl, *, wait: bool) -> None:
        """Conclude the evaluation that goes on beside training if it is finished, or wait until it is. Collective."""
        pending = self._pending
        if pending is None:
            return
        with self._evaluating(f"evaluation of step {pending.step}, beside training") as tell:
            tell("looking for results of all ranks")
            self._pending = None
            fields = self._attempt(lambda: pending.fields() if pending.advance(wait=wait) else None, pending.step)
            if fields is None:
                self._pending = pending
                return
            self._conclude(state, control, {"step": pending.step, "epoch": pending.epoch} | fields, tell)

    @contextmanager
    def _evaluating(self, work: str) -> Iterator[Tell]:
        """What training waits for: on the clock, and watched."""
        with self.clock.evaluating(), self._how.watchdog.over(work, collectives.rank()) as tell:
            yield tell

    def _conclude(self, state: TrainerState, control: TrainerControl, record: Record, tell: Tell) -> None:
        """The verdict on the history so far, the record of an evaluation, and its log lines. Collective."""
        record |= self.failures.count(record["mir"] is None, record.get("error"))
        tell("verdict of the stop rule")
        verdict = self.judge.conclude(self.history.records, record, state.max_steps)
        record |= {"elapsed": time.perf_counter() - self._started, "time": time.time()}
        record |= pace_fields(self.clock.share(state.global_step)) | self._begun
        tell("writing the history")
        try:
            self.history.append(record)
        except (OSError, TypeError, ValueError) as error:
            warnings.warn(f"step {record['step']}: MIR could not be written to disk: {error}", stacklevel=2)
        tell("logging")
        self.reports.send(record, self.history.records, self._how.told)
        say(evaluation_line(record, verdict))
        if "disabled" in record:
            say(f"[mir] step {record['step']}: {record['disabled']}")
        tell("keeping the best model")
        self._after_record(record)
        if verdict is not None and verdict.stop:
            self._stopped = control.should_training_stop = True

    def _after_record(self, record: Record) -> None:
        """Once in a resumed run say what is measured otherwise than before; keep the weights if they are the best."""
        if self._resumed_at is not None and record["mir"] is not None:
            told = changed_circumstances(self.history.records[: self._resumed_at], record)
            self._resumed_at = None
            if told and collectives.is_main():
                warnings.warn(told, stacklevel=2)
        told = self.best.offer(record) if self.best is not None else None
        if told:
            say(f"[mir] {told}")

    def _attempt(self, evaluation: Callable[[], Record | None], step: int) -> Record | None:
        """An evaluation's fields; `mir` None where it failed and that is tolerated."""
        started = time.perf_counter()
        try:
            fields = evaluation()
        except Exception as error:
            # A failure that only this rank has would leave it out of step with the others: better to end loudly.
            tolerated = self.failures.policy.tolerates(first=not self.history.records)
            if not tolerated or not collectives.is_shared(error):
                raise
            warnings.warn(f"step {step}: MIR evaluation failed, training goes on: {error}", stacklevel=2)
            failed = {"seconds": time.perf_counter() - started, "error": collectives.describe(error)}
            return {"mir": None, "per_layer": None, **failed, **self.definition()}
        if fields is not None and not math.isfinite(fields["mir"]):
            fields |= {"mir": None, "error": "every distance is zero: vision and text tokens cannot be told apart"}
        return fields
