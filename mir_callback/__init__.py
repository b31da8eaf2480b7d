# SPDX-License-Identifier: Apache-2.0
"""MIR, the Modality Integration Rate, inside the training loop of a vision-language model (arXiv:2410.07167)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mir_callback.errors import MIRError

if TYPE_CHECKING:
    from mir_callback.config import MIRArguments, MIRConfig
    from mir_callback.early_stopping import PlateauRule, Verdict
    from mir_callback.evaluation.evaluate import evaluate_mir
    from mir_callback.evaluation.report import MIRReport
    from mir_callback.integrations.huggingface import MIRCallback, attach_mir
    from mir_callback.integrations.sweeps import hyperparameter_search
    from mir_callback.metric.frechet import frechet_distance
    from mir_callback.metric.rate import MIRResult, modality_integration_rate
    from mir_callback.monitor import Decision, MIRMonitor
    from mir_callback.probe.adapters import register_adapter
    from mir_callback.probe.probe import Probe, Sample
    from mir_callback.record import EvalRecord
    from mir_callback.schedule import (
        AtSteps,
        EveryEpochs,
        EverySteps,
        LogSpaced,
        Schedule,
        TimeShare,
    )

__version__ = "0.1.0"

# Imported when they are first used: `mir --help` and `mir compare` need neither torch nor transformers.
_HOME = {
    "config": ("MIRArguments", "MIRConfig"),
    "early_stopping": ("PlateauRule", "Verdict"),
    "evaluation.evaluate": ("evaluate_mir",),
    "evaluation.report": ("MIRReport",),
    "integrations.huggingface": ("MIRCallback", "attach_mir"),
    "integrations.sweeps": ("hyperparameter_search",),
    "metric.frechet": ("frechet_distance",),
    "metric.rate": ("MIRResult", "modality_integration_rate"),
    "monitor": ("Decision", "MIRMonitor"),
    "probe.adapters": ("register_adapter",),
    "probe.probe": ("Probe", "Sample"),
    "record": ("EvalRecord",),
    "schedule": ("AtSteps", "EveryEpochs", "EverySteps", "LogSpaced", "Schedule", "TimeShare"),
}
_MODULES = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["MIRError", *_MODULES]


def __getattr__(name: str) -> Any:
    """A public name, imported from where it lives."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, whether imported yet or not."""
    return sorted({*globals(), *__all__})
