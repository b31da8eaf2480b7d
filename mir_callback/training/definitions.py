# SPDX-License-Identifier: Apache-2.0
"""How the numbers of a run are made, written once into the settings that each reporter keeps of a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mir_callback.training import wandb_run
from mir_callback.training.history import Record

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
    run = wandb_run.active()
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
