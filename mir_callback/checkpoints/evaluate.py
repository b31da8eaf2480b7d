# SPDX-License-Identifier: Apache-2.0
"""Evaluate one checkpoint: open it, measure it, and make the record that a run measuring itself would have made."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mir_callback import distributed
from mir_callback.checkpoints.discover import Checkpoint, compute_stamp, read_trainer_state
from mir_callback.checkpoints.load import DTYPES, LoadOptions, open_checkpoint, shorten_message
from mir_callback.checkpoints.results import Results
from mir_callback.config import MIRConfig
from mir_callback.errors import ConfigError, HistoryError, MIRError, NumericsError
from mir_callback.evaluation.evaluate import Evaluator
from mir_callback.history import FILE_NAME, read_history
from mir_callback.model.decoder import unwrap
from mir_callback.probe.probe import Probe
from mir_callback.record import CIRCUMSTANCES, EvalRecord

# What must be the same for a live value to be that of its checkpoint, and what to do where it is not.
_REMEDIES = {
    "probe_fingerprint": "give --probe the run's own",
    "tokens_fingerprint": "give --processor (for LLaVA --conversation) that of the run",
    "root": "give --root that of the run",
    "pixels_fingerprint": "the image processor has other settings or its image library another version",
    "dtype": "give --dtype or --autocast as the run had it",
}
_UNKNOWN_STEP = (
    "nothing tells the step of these weights: their value is recorded as that of step 0, and none of the run's own "
    "stands beside it; put trainer_state.json beside them (trainer.save_state() writes it)"
)


@dataclass(frozen=True)
class EvalOptions:
    """How checkpoints are evaluated."""

    loading: LoadOptions = field(default_factory=LoadOptions)
    device: torch.device = torch.device("cpu")  # of this rank
    autocast: str | None = None  # a name of DTYPES, as runs with bf16=True or fp16=True train; None: the weights' own
    config: MIRConfig = field(default_factory=MIRConfig)


def find_record(checkpoint: Checkpoint, probe: Probe, options: EvalOptions, results: Results) -> EvalRecord | None:
    """The record of the same evaluation made before, None if there is none or it failed. Ranks: collective."""
    record = next((record for record in results.records if record.step == checkpoint.step), None)
    with distributed.fail_together():
        method = _describe_method(checkpoint, probe, options) if distributed.is_main() else {}
    method = distributed.broadcast_object(method)
    if record is None or record.mir is None or any(record[name] != value for name, value in method.items()):
        return None
    return record


def evaluate_checkpoint(checkpoint: Checkpoint, probe: Probe, options: EvalOptions, results: Results) -> EvalRecord:
    """Evaluate one checkpoint and put its record among the results; MIRError if that fails. Ranks: collective.

    Where the hidden states define no value the record's `mir` is None, and its `error` says why.
    """
    gc.collect()  # the model before, which a failure may still refer to
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    started = time.perf_counter()
    with distributed.fail_together():
        record = replace(
            read_trainer_state(checkpoint), checkpoint=checkpoint.name, **_describe_method(checkpoint, probe, options)
        )
        opened = open_checkpoint(checkpoint, options.loading, options.device)
    with _explain_misfit():
        evaluator = Evaluator(opened.model, probe, opened.adapter, options.config)
    results.require_same_definition(evaluator.definition)
    with distributed.fail_together():
        _require_known_tokens(opened.model, evaluator)
    load_seconds = time.perf_counter() - started
    autocast = DTYPES[options.autocast] if options.autocast else None
    try:
        with _explain_misfit(), torch.autocast(options.device.type, autocast) if autocast else nullcontext():
            fields = evaluator.evaluate(opened.model).to_fields()
    except NumericsError as error:  # the same on every rank
        seconds = time.perf_counter() - started - load_seconds
        fields = {**evaluator.definition, "error": distributed.describe(error), "seconds": seconds}
    return results.put(replace(record, **fields, load_seconds=load_seconds, time=time.time()))


def _describe_method(checkpoint: Checkpoint, probe: Probe, options: EvalOptions) -> dict[str, Any]:
    """The fields that are equal in two records of the same evaluation."""
    return {
        "probe_fingerprint": probe.fingerprint,
        "root": options.config.root,
        "loading": {**asdict(options.loading), "autocast": options.autocast},
        "weights_stamp": compute_stamp(checkpoint),
    }


@contextmanager
def _explain_misfit() -> Iterator[None]:
    """Around encoding and forwards, which fail in any way where a processor is of another model."""
    try:
        yield
    except MIRError:
        raise
    except Exception as error:
        if not distributed.is_shared(error):
            raise
        raise ConfigError(
            f"the forward fails on what the processor makes: {shorten_message(error)}; see whether --processor is the "
            "model's own, and memory enough for --batch-size"
        ) from error


def _require_known_tokens(model: nn.Module, evaluator: Evaluator) -> None:
    """Refuse ids that the model has no embedding of: on a GPU they would end the process."""
    top: Any = unwrap(model)
    known = int(top.get_input_embeddings().weight.shape[0])
    highest = max(int(batch.inputs["input_ids"].max()) for batch in evaluator.batches)
    if highest >= known:
        raise ConfigError(
            f"the processor is not the model's: it makes token id {highest} for a vocabulary of {known}; give "
            "--processor the folder or hub name of the model's own"
        )


class LiveValues:
    """A run's own values, to be looked at beside those of its checkpoints, if its output folder has a history."""

    def __init__(self, run: Path) -> None:
        self.problem: str | None = None  # why there are none although there is a history
        self._said: set[str] = set()
        records, path = [], run / FILE_NAME
        try:
            records = read_history(path) if path.exists() else []
        except (HistoryError, OSError) as error:
            self.problem = f"the values of the run itself cannot be shown beside: {error}"
        self._by_step = {record.step: record for record in records if record.mir is not None}

    def find(self, record: EvalRecord, *, step_known: bool) -> tuple[float | None, list[str]]:
        """The live value of a record's step that was made the same way, and what to know before comparing the two.

        These are sentences, each only the first time. Without ``step_known`` the record's step is not that of its
        weights, only where such values are put.
        """
        if not step_known:
            return None, [_UNKNOWN_STEP] if self._by_step else []
        live = self._by_step.get(record.step)
        if live is None or record.mir is None:
            return None, []
        changed = [name for name in _REMEDIES if None not in (live[name], record[name]) and live[name] != record[name]]
        notes = [
            f"the run measured itself with {name} {live[name]}, its checkpoints are with {record[name]}: "
            f"{_REMEDIES[name]}"
            for name in changed
            if name not in self._said
        ]
        self._said.update(changed)
        return (live.mir if set(changed) <= set(CIRCUMSTANCES) else None), notes
