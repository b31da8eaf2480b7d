# SPDX-License-Identifier: Apache-2.0
"""MIR, the Modality Integration Rate, inside the training loop of a vision-language model (arXiv:2410.07167)."""

from mir_callback.config import MIRArguments
from mir_callback.early_stopping import PlateauRule, Verdict
from mir_callback.errors import MIRError
from mir_callback.evaluation.evaluate import MIRReport, evaluate_mir
from mir_callback.integrations.huggingface import MIRCallback
from mir_callback.integrations.sweeps import hyperparameter_search
from mir_callback.metric.frechet import frechet_distance
from mir_callback.metric.rate import MIRResult, modality_integration_rate
from mir_callback.probe.probe import Probe, Sample
from mir_callback.schedule import AtSteps, EveryEpochs, EverySteps, LogSpaced, Schedule, TimeShare

__version__ = "0.1.0"

__all__ = [
    "AtSteps",
    "EveryEpochs",
    "EverySteps",
    "LogSpaced",
    "MIRArguments",
    "MIRCallback",
    "MIRError",
    "MIRReport",
    "MIRResult",
    "PlateauRule",
    "Probe",
    "Sample",
    "Schedule",
    "TimeShare",
    "Verdict",
    "evaluate_mir",
    "frechet_distance",
    "hyperparameter_search",
    "modality_integration_rate",
]
