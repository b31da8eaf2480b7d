# SPDX-License-Identifier: Apache-2.0
"""Reports an evaluation to everything that watches the run. None of it can end the run."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tqdm.auto import tqdm

from mir_callback import distributed as collectives
from mir_callback.early_stopping import Verdict
from mir_callback.history import STOPPING, Record, lowest_record


@dataclass(frozen=True)
class Alert:
    """A message to whoever watches a run.

    Attributes:
        title: a few words.
        text: step and reason.
        urgent: a warning, not just news.
    """

    title: str
    text: str
    urgent: bool


def due_alert(earlier: Sequence[Record], record: Record) -> Alert | None:
    """What to tell of an evaluation.

    A plateau is told once in a training stage, a rise once until MIR has recovered from it: until an evaluation finds
    that it goes on falling, or level. What was told is known from the records, so a resumed run does not repeat it.

    Args:
        earlier: the run's records before it.
        record: the evaluation.

    Ranks: pure.
    """
    same = [old for old in earlier if old.get("stage") == record.get("stage")]
    text = f"step {record['step']}, MIR {_value(record)}: {record.get('reason')}"
    if record.get("verdict") == STOPPING:
        return Alert("MIR has reached its plateau: training stops", text, urgent=False)
    if record.get("would_stop") and not any(old.get("would_stop") for old in same):
        return Alert("MIR has reached its plateau", text, urgent=False)
    if record.get("verdict") == "rising":
        clear = [old["verdict"] for old in same if old.get("verdict") in ("rising", "going on", STOPPING)]
        if clear[-1:] != ["rising"]:
            return Alert("MIR is rising", text, urgent=True)
    return None


def _value(record: Record) -> str:
    return "unknown" if record["mir"] is None else f"{record['mir']:.4f}"


UNATTACHED = (
    "[mir] this callback is not attached to the Trainer: values go to the history file and, if a run is active, "
    "directly to wandb. MIRCallback(...).attach(trainer) would send them through Trainer.log as well, to every "
    "reporter and to trainer.state.log_history."
)


def say(line: str) -> None:
    """Print a line above the progress bars. Ranks: all; rank 0 prints."""
    if collectives.is_main():
        with suppress(OSError):  # a full disk behind stdout, a closed pipe: there is nowhere to say it
            tqdm.write(line)


def evaluation_line(record: Record, verdict: Verdict | None) -> str:
    """One evaluation in one line."""
    if record["mir"] is None:
        return f"[mir] step {record['step']}: evaluation FAILED after {record['seconds']:.1f} s: {record['error']}"
    error = record.get("mir_se")
    spread = "" if error is None else f" +- {error:.4f}"
    line = f"[mir] step {record['step']}: MIR {record['mir']:.4f}{spread} ({record['seconds']:.1f} s)"
    if verdict is None:
        return line
    if verdict.would_stop:
        what = "stopping training" if verdict.stop else "only observing, training goes on"
        return f"{line} {verdict.kind}; {what}: {verdict.reason}"
    return f"{line} {verdict.kind}: {verdict.reason}"


def held_line(last: Record) -> str:
    """Why a resumed run does not go on, and how it would."""
    return (
        f"[mir] this run was stopped on its plateau at step {last['step']} ({last.get('reason')}) and stays stopped; "
        "the Trainer looks for this only after a batch, and may take one step. To train on, give "
        "MIRCallback(continue_after_stop=True) (--mir_continue_after_stop), or stop=None."
    )


# What the stop rule expects of going on.
GAINS = ("expected_gain", "expected_gain_se")


def log_values(record: Record, history: Sequence[Record] = ()) -> dict[str, float]:
    """What is logged of a record; nothing if the evaluation failed.

    The Trainer's reporters put `train/` before each name. Layers count from 1, as in the history.

    Args:
        record: the evaluation.
        history: all of the run's so far, for the best of them; ``record`` may be among them.

    Returns:
        `mir`, `mir_layer/01`.., `mir_seconds`, `mir_best`, `mir_best_step`, and what the record knows of `mir_se`,
        `mir_extrapolated`, `mir_probe_loss`, `mir_probe_perplexity`, `mir_expected_gain`, `mir_expected_gain_se`,
        `mir_memory_gb`, `mir_time_share` and the :func:`summaries` of companions.
    """
    if record["mir"] is None:
        return {}
    width = max(2, len(str(len(record["per_layer"]))))
    layers = {f"mir_layer/{k:0{width}d}": value for k, value in enumerate(record["per_layer"], start=1)}
    best = best_record([*history, record])
    values = {"mir": record["mir"], **layers, "mir_seconds": record["seconds"]}
    if record.get("mir_se") is not None:
        values["mir_se"] = record["mir_se"]
    if record.get("mir_extrapolated") is not None:
        values["mir_extrapolated"] = record["mir_extrapolated"]
    if record.get("probe_loss") is not None:
        values |= {"mir_probe_loss": record["probe_loss"], "mir_probe_perplexity": math.exp(record["probe_loss"])}
    values |= summaries(record)
    values |= {f"mir_{name}": record[name] for name in GAINS if record.get(name) is not None}
    values |= {"mir_best": best["mir"], "mir_best_step": best["step"]}
    if record.get("peak_memory_bytes") is not None:
        values["mir_memory_gb"] = record["peak_memory_bytes"] / 1e9
    spent = record.get("train_seconds", 0.0) + record.get("eval_seconds", 0.0)
    return values | ({"mir_time_share": record["eval_seconds"] / spent} if spent > 0 else {})


def summaries(record: Record) -> dict[str, float]:
    """One number over all layers for each companion, where the record has them.

    `mir_mean_share` is the part of the summed distances that the means' gaps make, the others are means over layers.

    Ranks: pure.
    """
    companions = record.get("companions")
    if not companions:
        return {}
    found = {f"mir_{name}": fmean(companions[name]) for name in ("norm_ratio", "cosine", "vision_rank", "text_rank")}
    return {"mir_mean_share": math.fsum(companions["mean_part"]) / math.fsum(record["per_layer"])} | found


def best_record(history: Sequence[Record]) -> Record:
    """What :func:`lowest_record` finds, or before anything is trained the first with a value. One must have a value."""
    return lowest_record(history) or next(record for record in history if record["mir"] is not None)


def through_trainer(trainer: Any) -> Callable[[dict[str, float], Record], None]:
    """Log through `Trainer.log`, which reaches every reporter and `state.log_history`.

    Reporters read the step from the Trainer's state: while they do it has that of the record, which may be an earlier
    one. Logging clears `control.should_log`, which would swallow the loss of the same step: it is put back.

    Ranks: all, as `Trainer.log` is.
    """

    def log(values: dict[str, float], record: Record) -> None:
        due, state = trainer.control.should_log, trainer.state
        now = state.global_step, state.epoch
        try:
            state.global_step, state.epoch = record["step"], record.get("epoch", state.epoch)
            trainer.log(values)
        finally:
            trainer.control.should_log = due
            state.global_step, state.epoch = now

    return log


CURVE, HEAT_MAP = "mir/per_layer", "mir/layers_over_steps"
_MAX_BINS = 512  # of a wandb histogram
_AXIS = "train/global_step"


def active() -> Any:
    """The active wandb run of this process, or None; wandb is not imported for it."""
    return getattr(sys.modules.get("wandb"), "run", None)


def use_trainers_axis(run: Any) -> None:
    """Draw our values over the optimizer step, as the Trainer's own reporter does with all it logs."""
    run.define_metric(_AXIS)
    for names in ("train/mir*", "mir/*"):
        run.define_metric(names, step_metric=_AXIS, step_sync=True)


def log(run: Any, values: dict[str, float], step: int) -> None:
    """Log scalars as the Trainer's own reporter would, in one row with the charts that wait for it."""
    run.log({**{f"train/{name}": value for name, value in values.items()}, _AXIS: step})


def add_charts(run: Any, record: Record, history: Sequence[Record]) -> None:
    """Charts of an evaluation with a value, and the best value so far. The charts wait for the row logged next.

    The best value and its step stand in the run's summary, where tables and sweeps look, and the last verdict in words.
    """
    measured = [old for old in [*history, record] if old["mir"] is not None]
    best = best_record(measured)
    run.log(charts(record, measured[0], best), commit=False)
    words = {"mir_verdict": record.get("verdict"), "mir_reason": record.get("reason")} if record.get("verdict") else {}
    run.summary.update({"mir_best": best["mir"], "mir_best_step": best["step"], **words})


def send_alert(run: Any, alert: Alert) -> None:
    """Have wandb tell the run's owner, as their settings have it. An offline run does so when it is synced."""
    run.alert(title=alert.title, text=alert.text, level="WARN" if alert.urgent else "INFO")


def charts(record: Record, first: Record, best: Record) -> dict[str, Any]:
    """Pictures of one evaluation, by their names.

    Args:
        record: the evaluation, with a value.
        first: the run's first one with a value, to compare with.
        best: the one with the lowest MIR.

    Returns:
        A line chart of the distances over the layers (first, best, this one), and a histogram with one bar a layer,
        which wandb draws over the steps as a heat map, layer x step. Needs wandb.
    """
    import numpy as np
    import wandb

    layers = list(range(1, len(record["per_layer"]) + 1))
    curves = {f"first, step {first['step']}": first["per_layer"], f"best, step {best['step']}": best["per_layer"]}
    curves[f"step {record['step']}"] = record["per_layer"]
    pictures: dict[str, Any] = {
        CURVE: wandb.plot.line_series(
            xs=layers,
            ys=list(curves.values()),
            keys=list(curves),
            title="Distance of vision from text tokens in each layer",
            xname="decoder layer",
        )
    }
    if len(layers) <= _MAX_BINS:
        edges = [layer - 0.5 for layer in [*layers, len(layers) + 1]]
        pictures[HEAT_MAP] = wandb.Histogram(np_histogram=(np.array(record["per_layer"]), np.array(edges)))
    return pictures


Definition = Mapping[str, Any]

# What a record says of how it was made; the callback adds its schedule.
RECORD_FIELDS = (
    "probe_fingerprint",
    "tokens_fingerprint",
    "root",
    "dtype",
    "num_samples",
    "num_vision_tokens",
    "num_text_tokens",
    "world_size",
)


def definition_of(record: Record, options: Definition) -> dict[str, Any]:
    """What a run's settings should say about its MIR: from a record with a value, and the callback's options."""
    return {name: record[name] for name in RECORD_FIELDS if name in record} | dict(options)


def is_kind(reporter: Any, name: str) -> bool:
    """Whether a Trainer's callback is of the class with this name, or of one derived from it."""
    return any(kind.__name__ == name for kind in type(reporter).__mro__)


def writers(reporters: list[Any]) -> Iterator[tuple[str, Callable[[Definition], None]]]:
    """For each tracker in use, its name and what writes a definition there.

    Args:
        reporters: the Trainer's callbacks; empty where they are not known.
    """
    run = active()
    if run is not None:
        yield "wandb", lambda definition: run.config.update({"mir": dict(definition)}, allow_val_change=True)
    for reporter in reporters:
        if is_kind(reporter, "TensorBoardCallback") and getattr(reporter, "tb_writer", None) is not None:
            yield "TensorBoard", _as_text(reporter.tb_writer)
        elif is_kind(reporter, "MLflowCallback") and "mlflow" in sys.modules:
            yield "MLflow", _as_parameters(sys.modules["mlflow"])
        elif is_kind(reporter, "TrackioCallback") and "trackio" in sys.modules:
            yield "Trackio", _as_config(sys.modules["trackio"])


def _as_text(writer: Any) -> Callable[[Definition], None]:
    def write(definition: Definition) -> None:
        writer.add_text("mir/definition", "    " + json.dumps(dict(definition), indent=2).replace("\n", "\n    "))
        writer.flush()

    return write


def _as_parameters(mlflow: Any) -> Callable[[Definition], None]:
    return lambda definition: mlflow.log_params({f"mir.{name}": value for name, value in definition.items()})


def _as_config(trackio: Any) -> Callable[[Definition], None]:
    return lambda definition: trackio.config.update({"mir": dict(definition)}, allow_val_change=True)


class Reports:
    """Sends each evaluation to the Trainer's reporters and to wandb.

    A tracker that fails costs one warning; training, the history file and the other trackers go on.

    Args:
        trainer: the Trainer to log through, or None for wandb alone.
    """

    def __init__(self, trainer: Any = None) -> None:
        self.attached = trainer is not None
        self._log = through_trainer(trainer) if self.attached else None
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
        run = active()
        reporters = self._reporters()
        # The Trainer's reporter logs to wandb too; without it we do.
        direct = run is not None and not any(is_kind(reporter, "WandbCallback") for reporter in reporters)
        if collectives.is_main():
            if not self._defined:
                self._define(run if direct else None, reporters, definition_of(record, options))
            if run is not None:
                with self._guarded("wandb"):
                    add_charts(run, record, history)
                self._alert(run, record, history)
        values = log_values(record, history)
        if self._log is not None:
            with self._guarded("the Trainer's reporters"):
                self._log(values, record)
        if direct:
            with self._guarded("wandb"):
                log(run, values, record["step"])

    def _alert(self, run: Any, record: Record, history: Sequence[Record]) -> None:
        alert = due_alert([old for old in history if old is not record], record)
        if alert is not None:
            with self._guarded("wandb alerts"):
                send_alert(run, alert)

    def _define(self, bare_run: Any, reporters: list[Any], definition: Mapping[str, Any]) -> None:
        if bare_run is not None:
            with self._guarded("wandb"):
                use_trainers_axis(bare_run)
        for name, write in writers(reporters):
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
