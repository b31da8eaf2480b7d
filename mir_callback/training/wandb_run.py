# SPDX-License-Identifier: Apache-2.0
"""What only wandb can hold: the curve over the layers as a chart, all of them as a heat map, the best value."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from mir_callback.training.alerts import Alert
from mir_callback.training.history import Record
from mir_callback.training.trackers import best_record

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
