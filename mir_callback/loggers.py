# SPDX-License-Identifier: Apache-2.0
"""Where the values of an evaluation go: the loop's own logging, wandb, the run settings of other trackers.

A failing tracker never ends the run: it costs one warning, and the values are in the history file.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from mir_callback import distributed
from mir_callback.errors import ConfigError
from mir_callback.record import DESCRIBED_FIELDS, STOPPING, EvalRecord, is_newly_contradicted, lowest_record

CURVE, HEAT_MAP = "mir/per_layer", "mir/layers_over_steps"
_MAX_BINS = 512  # of a wandb histogram
_AXIS = "train/global_step"
_WANDB_REPORTERS = ("WandbCallback", "WandBTracker", "WandbLogger")  # of transformers, Accelerate and Lightning
# The fields of a record that define its value; the options of the run are added.
_DEFINITION = (*DESCRIBED_FIELDS, "dtype", "num_samples", "num_vision_tokens", "num_text_tokens", "world_size")

log = logging.getLogger(__name__)

# Called with the scalars of an evaluation and its record.
LogFunction = Callable[[dict[str, float], EvalRecord], None]


class Loggers:
    """Sends each evaluation to the loop's own logging, and to wandb if a run is active.

    Args:
        log: the loop's logging, or None: a function of (values, step); an object with `add_scalar`, such as a
            TensorBoard writer; one with `log(values, step=...)`, such as Accelerate and Lightning's Fabric.
        through: instead, a function of (values, record) that is called on every rank, like a Trainer's log.
        reporters: the trackers behind it: a Trainer's callbacks, Lightning's loggers.
        options: of the run; with the definition they go into each tracker's run settings, once.
        commit: give each evaluation a wandb row of its own. By default it joins the row that the loop logs next: wandb
            would drop what a loop that numbers its rows by steps logs for the same step afterwards.

    Raises:
        ConfigError: ``log`` is none of these.
    """

    def __init__(
        self,
        log: Any = None,
        *,
        through: LogFunction | None = None,
        reporters: Callable[[], list[Any]] = list,
        options: Mapping[str, Any] | None = None,
        commit: bool = False,
    ) -> None:
        self._log = through if through is not None else _log_function(log)
        self._log_name = "log=" if through is None else "the Trainer's reporters"
        self._reporters = reporters
        self._own = [*getattr(log, "trackers", ()), *getattr(log, "loggers", ())]  # of an Accelerator, of Fabric
        self._options = options or {}
        self._commit = commit
        self._waiting_at: int | None = None  # wandb's step of a row of ours that the loop has not ended yet
        self._is_defined = False
        self._failed: set[str] = set()

    def send(self, record: EvalRecord, history: Sequence[EvalRecord]) -> None:
        """Log an evaluation, the last of ``history``; nothing if it failed.

        Ranks: all, like `Trainer.log`; charts and settings are rank 0's.
        """
        if record.mir is None:
            return
        run, reporters = active_wandb_run(), self._reporters()
        is_logged = any(_is_kind(reporter, *_WANDB_REPORTERS) for reporter in [*reporters, *self._own])
        direct = run is not None and not is_logged
        if distributed.is_main():
            if not self._is_defined:
                self._define(run if direct else None, reporters, record)
            if run is not None:
                with self._guarded("wandb"):
                    if self._waiting_at is not None and run.step == self._waiting_at:
                        run.log({}, commit=True)  # nobody else has logged: two evaluations are two rows
                    _add_charts(run, record, history)
                for alert in due_alerts([old for old in history if old is not record], record):
                    with self._guarded("wandb alerts"):
                        run.alert(title=alert.title, text=alert.text, level="WARN" if alert.is_urgent else "INFO")
        values = log_values(record, history)
        if self._log is not None:
            with self._guarded(self._log_name):
                self._log(values, record)
        if direct:
            with self._guarded("wandb"):
                row = {**{f"train/{name}": value for name, value in values.items()}, _AXIS: record.step}
                run.log(row, commit=self._commit)
                self._waiting_at = None if self._commit else run.step

    def close(self, files: Mapping[str, Path]) -> None:
        """Upload history and probe, by name, to wandb as an artifact; `mir compare` reads its downloaded folder.

        Ranks: all; rank 0 uploads.
        """
        run = active_wandb_run()
        there = {name: path for name, path in files.items() if path.is_file()}
        if run is None or "wandb" in self._failed or not there or not distributed.is_main():
            return
        with self._guarded("wandb artifacts"):
            import wandb

            artifact = wandb.Artifact(f"mir-{run.id}", type="mir-history")
            for name, path in there.items():
                artifact.add_file(str(path), name, policy="immutable")
            run.log_artifact(artifact)

    def _define(self, bare_run: Any, reporters: list[Any], record: EvalRecord) -> None:
        definition = {name: record[name] for name in _DEFINITION if record[name] is not None} | dict(self._options)
        if bare_run is not None:
            with self._guarded("wandb"):
                # Our values over the optimizer step, as the Trainer's own reporter does with all it logs.
                bare_run.define_metric(_AXIS)
                for names in ("train/mir*", "mir/*"):
                    bare_run.define_metric(names, step_metric=_AXIS, step_sync=True)
        for name, write in _definition_writers(reporters):
            with self._guarded(name):
                write(definition)
        self._is_defined = True

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Turn a failure inside into one warning for each tracker. No collectives inside."""
        try:
            yield
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                log.warning(
                    "could not log MIR to %s: %s: %s; training goes on, values are in the history file, further "
                    "failures there are not reported",
                    *(name, type(error).__name__, error),
                )


def log_values(record: EvalRecord, history: Sequence[EvalRecord] = ()) -> dict[str, float]:
    """The logged scalars of a record; none if the evaluation failed.

    The Trainer's trackers put `train/` before each name. Layers count from 1, as in the history.

    Args:
        record: the evaluation.
        history: the run's evaluations so far; ``record`` may be among them.

    Returns:
        `mir`, `mir_layer/01`.., `mir_seconds`; if the record has them `mir_se`, `mir_scale_free`, `mir_vision_gain`,
        `mir_vision_gain_se`, `mir_probe_loss`, `mir_probe_perplexity`, `mir_expected_gain`, `mir_expected_gain_se`,
        `mir_memory_gb`, `mir_time_share` and :func:`summarize_companions`; after the first optimizer step `mir_best`,
        the lowest MIR since then, and `mir_best_step`.

    Ranks: pure.

    Example:
        >>> start, later = EvalRecord(step=0, mir=1.9, seconds=2.0), EvalRecord(step=50, mir=2.5, seconds=2.0)
        >>> log_values(later, [start])
        {'mir': 2.5, 'mir_seconds': 2.0, 'mir_best': 2.5, 'mir_best_step': 50}
    """
    if record.mir is None:
        return {}
    layers = record.per_layer or []
    width = max(2, len(str(len(layers))))
    best = lowest_record([*history, record])
    spent = (record.train_seconds or 0.0) + (record.eval_seconds or 0.0)
    loss = record.probe_loss
    values: dict[str, float | None] = {
        "mir": record.mir,
        **{f"mir_layer/{k:0{width}d}": value for k, value in enumerate(layers, start=1)},
        "mir_seconds": record.seconds,
        "mir_se": record.mir_se,
        "mir_scale_free": record.scale_free_mir,
        "mir_vision_gain": record.vision_gain,
        "mir_vision_gain_se": record.vision_gain_se,
        "mir_probe_loss": loss,
        "mir_probe_perplexity": None if loss is None else math.exp(min(loss, 700.0)),
        **summarize_companions(record),
        "mir_expected_gain": record.expected_gain,
        "mir_expected_gain_se": record.expected_gain_se,
        "mir_best": None if best is None else best.mir,
        "mir_best_step": None if best is None else best.step,
        "mir_memory_gb": None if record.peak_memory_bytes is None else record.peak_memory_bytes / 1e9,
        "mir_time_share": (record.eval_seconds or 0.0) / spent if spent > 0 else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def summarize_companions(record: EvalRecord) -> dict[str, float]:
    """One number over all layers for each companion, if the record has them.

    `mir_mean_share` is the share of the summed distances that comes from the gap between the means; the others are
    means over the layers. Ranks: pure.
    """
    companions = record.companions
    if not companions or not record.per_layer:
        return {}
    found = {f"mir_{name}": fmean(companions[name]) for name in ("norm_ratio", "cosine", "vision_rank", "text_rank")}
    return {"mir_mean_share": math.fsum(companions["mean_part"]) / math.fsum(record.per_layer)} | found


@dataclass(frozen=True)
class Alert:
    """A wandb alert."""

    title: str
    text: str  # step and reason
    is_urgent: bool


def due_alerts(earlier: Sequence[EvalRecord], record: EvalRecord) -> list[Alert]:
    """The alerts that an evaluation calls for.

    A plateau and a contradiction are reported once in a training stage; a rise once, and again only after an evaluation
    found MIR falling or level. Earlier alerts are known from the records, so a resumed run does not repeat them.
    Ranks: pure.
    """
    found = []
    if is_newly_contradicted(earlier, record):
        found.append(Alert("Vision gain contradicts MIR", f"step {record.step}: {record.contradiction}", True))
    same = [old for old in earlier if old.stage == record.stage]
    value = "unknown" if record.mir is None else f"{record.mir:.4f}"
    text = f"step {record.step}, MIR {value}: {record.reason}"
    if record.verdict == STOPPING:
        found.append(Alert("MIR has reached its plateau: training stops", text, is_urgent=False))
    elif record.would_stop and not any(old.would_stop for old in same):
        found.append(Alert("MIR has reached its plateau", text, is_urgent=False))
    elif record.verdict == "rising":
        clear = [old.verdict for old in same if old.verdict in ("rising", "going on", STOPPING)]
        if clear[-1:] != ["rising"]:
            found.append(Alert("MIR is rising", text, is_urgent=True))
    return found


def active_wandb_run() -> Any:
    """The active wandb run of this process, or None; wandb is not imported for it."""
    return getattr(sys.modules.get("wandb"), "run", None)


def _log_function(target: Any) -> LogFunction | None:
    """What :class:`Loggers` takes as ``log``, called on rank 0."""
    run, wandb = active_wandb_run(), sys.modules.get("wandb")
    if target is None or (run is not None and target in (run, run.log, wandb, getattr(wandb, "log", None))):
        return None  # the active run is logged to anyway
    if hasattr(target, "add_scalar"):

        def write(values: dict[str, float], record: EvalRecord) -> None:
            for name, value in values.items():
                target.add_scalar(name, value, record.step)
    elif callable(getattr(target, "log", None)):

        def write(values: dict[str, float], record: EvalRecord) -> None:
            target.log(values, step=record.step)
    elif callable(target):

        def write(values: dict[str, float], record: EvalRecord) -> None:
            target(values, record.step)
    else:
        raise ConfigError(
            f"log={target!r:.60}: pass a function of (values, step), or an object with add_scalar(name, value, step) "
            "or log(values, step=...)"
        )
    return lambda values, record: write(values, record) if distributed.is_main() else None


def _add_charts(run: Any, record: EvalRecord, history: Sequence[EvalRecord]) -> None:
    """Log the charts of an evaluation with the row logged next, and the best value to the summary."""
    measured = [old for old in [*history, record] if old.mir is not None]
    best = lowest_record(measured)
    run.log(make_charts(record, measured[0], best), commit=False)
    if best is not None:
        run.summary.update({"mir_best": best.mir, "mir_best_step": best.step})
    if record.verdict:
        run.summary.update({"mir_verdict": record.verdict, "mir_reason": record.reason})
    if record.contradiction:
        run.summary.update({"mir_contradiction": record.contradiction})


def make_charts(record: EvalRecord, first: EvalRecord, best: EvalRecord | None) -> dict[str, Any]:
    """By name: a curve of the distances over the layers, and a histogram that wandb draws over steps as a heat map."""
    import numpy as np
    import wandb

    drawn = {f"first, step {first.step}": first}
    if best is not None:
        drawn[f"best, step {best.step}"] = best
    drawn[f"step {record.step}"] = record
    layers = list(range(1, len(record.per_layer or ()) + 1))
    charts: dict[str, Any] = {
        CURVE: wandb.plot.line_series(
            xs=layers,
            ys=[each.per_layer or [] for each in drawn.values()],
            keys=list(drawn),
            title="Distance of vision from text tokens in each layer",
            xname="decoder layer",
        )
    }
    if len(layers) <= _MAX_BINS:
        edges = [layer - 0.5 for layer in [*layers, len(layers) + 1]]
        charts[HEAT_MAP] = wandb.Histogram(np_histogram=(np.array(record.per_layer), np.array(edges)))
    return charts


def _is_kind(reporter: Any, *names: str) -> bool:
    """Whether a reporter's class, or one it derives from, has one of these names."""
    return any(kind.__name__ in names for kind in type(reporter).__mro__)


def _definition_writers(reporters: list[Any]) -> Iterator[tuple[str, Callable[[dict[str, Any]], object]]]:
    """For each tracker in use, its name and a function that writes the definition into its run settings."""
    run = active_wandb_run()
    if run is not None:
        yield "wandb", lambda definition: run.config.update({"mir": definition}, allow_val_change=True)
    for reporter in reporters:
        if _is_kind(reporter, "TensorBoardCallback") and getattr(reporter, "tb_writer", None) is not None:
            yield "TensorBoard", partial(_write_text, reporter.tb_writer)
        elif _is_kind(reporter, "MLflowCallback") and "mlflow" in sys.modules:
            yield "MLflow", partial(_write_parameters, sys.modules["mlflow"])
        elif _is_kind(reporter, "TrackioCallback") and "trackio" in sys.modules:
            yield "Trackio", partial(_write_config, sys.modules["trackio"])
        elif _is_kind(reporter, "SwanLabCallback") and "swanlab" in sys.modules:
            yield "SwanLab", lambda definition: sys.modules["swanlab"].config.update({"mir": definition})


def _write_text(writer: Any, definition: dict[str, Any]) -> None:
    writer.add_text("mir/definition", "    " + json.dumps(definition, indent=2).replace("\n", "\n    "))
    writer.flush()


def _write_parameters(mlflow: Any, definition: dict[str, Any]) -> None:
    mlflow.log_params({f"mir.{name}": value for name, value in definition.items()})


def _write_config(trackio: Any, definition: dict[str, Any]) -> None:
    trackio.config.update({"mir": definition}, allow_val_change=True)
