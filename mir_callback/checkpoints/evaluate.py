# SPDX-License-Identifier: Apache-2.0
"""Evaluate one checkpoint, into the record that the run would have written at that step."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mir_callback import distributed
from mir_callback.checkpoints.discover import Checkpoint, compute_stamp, read_trainer_state
from mir_callback.checkpoints.load import DTYPES, LoadOptions, open_checkpoint, shorten_message
from mir_callback.checkpoints.results import Results
from mir_callback.config import MIRConfig
from mir_callback.errors import ConfigError, HistoryError, MIRError, NumericsError
from mir_callback.evaluation.evaluate import Evaluator
from mir_callback.history import FILE_NAME, read_history
from mir_callback.probe.probe import Probe
from mir_callback.probe.prompt import is_format
from mir_callback.record import CIRCUMSTANCES, EvalRecord, read_definition

# What has to be equal for a value measured during training to be that of the checkpoint, and what to do if it is not.
_REMEDIES = {
    "probe_fingerprint": "pass the probe of the run: --probe",
    "prompt": "pass the prompt of the run: --prompt",
    "tokens_fingerprint": "pass the processor and the prompt of the run: --processor, --prompt",
    "root": "pass the root of the run: --root",
    "text_positions": "pass that of the run: --text-positions",
    "text_only": "pass that of the run: --text-only",
    "vision_ids": "pass those of the run: --vision-ids",
    "pixels_fingerprint": "the image processor's settings or its image library differ",
    "dtype": "pass the precision of the run: --dtype or --autocast",
}
_UNKNOWN_STEP = (
    "the step of these weights is unknown: they are recorded as step 0 and not compared with the values of the run. "
    "Write trainer_state.json beside them (trainer.save_state())"
)


@dataclass(frozen=True)
class EvalOptions:
    """How checkpoints are evaluated."""

    loading: LoadOptions = field(default_factory=LoadOptions)
    device: torch.device = torch.device("cpu")  # of this rank
    autocast: str | None = None  # bfloat16 or float16, as with bf16=True or fp16=True in training; None for none
    config: MIRConfig = field(default_factory=MIRConfig)

    def with_options(self, options: Mapping[str, Any]) -> EvalOptions:
        """The same with these of ``prompt``, ``text_positions`` and ``text_only``."""
        loaded = {name: value for name, value in options.items() if name != "text_only"}
        return replace(self, loading=replace(self.loading, **loaded), config=replace(self.config, **options))


def find_record(checkpoint: Checkpoint, probe: Probe, options: EvalOptions, results: Results) -> EvalRecord | None:
    """The record of an earlier evaluation with the same options; None if there is none or it failed. Collective."""
    record = next((record for record in results.records if record.step == checkpoint.step), None)
    with distributed.fail_together():
        method = _describe_method(checkpoint, probe, options) if distributed.is_main() else {}
    method = distributed.broadcast_object(method)
    if (
        record is None
        or record.mir is None
        or any((read_definition(record, name) or None) != value for name, value in method.items())
    ):
        return None
    if options.config.vision_gain and record.vision_gain is None:
        return None
    return record


def evaluate_checkpoint(checkpoint: Checkpoint, probe: Probe, options: EvalOptions, results: Results) -> EvalRecord:
    """Evaluate one checkpoint and store its record in the results; MIRError if that fails. Ranks: collective.

    If the hidden states give no MIR (e.g. NaN), the record has `mir` None, and the reason in `error`.
    """
    gc.collect()  # the previous model, which an exception may still refer to
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
    """The record's fields that identify how it was evaluated."""
    loading = asdict(options.loading)
    loading.pop("trust_checkpoint")  # changes no value
    for name in ("text_positions", "vision_ids"):
        loading.pop(name)  # has a field of its own
    return {
        "probe_fingerprint": probe.fingerprint,
        "root": options.config.root,
        "text_positions": options.config.text_positions,
        "vision_ids": options.config.vision_ids,
        "text_only": options.config.text_only,
        "loading": {**loading, "autocast": options.autocast},
        "weights_stamp": compute_stamp(checkpoint),
    }


@contextmanager
def _explain_misfit() -> Iterator[None]:
    """For encoding and forwards: with the wrong processor these fail with any kind of error."""
    try:
        yield
    except MIRError:
        raise
    except Exception as error:
        if not distributed.is_shared(error):
            raise
        raise ConfigError(
            f"The model failed on the probe: {shorten_message(error)}. Check that the processor is the model's own "
            "(--processor), and that memory suffices for --batch-size."
        ) from error


class LiveValues:
    """The values a run measured during training, to be shown beside those of its checkpoints."""

    def __init__(self, run: Path) -> None:
        self.problem: str | None = None  # why its history could not be read
        self._noted: set[str] = set()
        records, path = [], run / FILE_NAME
        try:
            records = read_history(path) if path.exists() else []
        except (HistoryError, OSError) as error:
            self.problem = f"values of the run itself are not shown: {error}"
        self._by_step = {record.step: record for record in records if record.mir is not None}

    @property
    def options(self) -> dict[str, str]:
        """Options that the run's newest value was measured with: its prompt if it is a format string, and its text."""
        records = list(self._by_step.values())
        if not records:
            return {}
        names = ("text_positions", "text_only", "vision_ids")
        found = {name: value for name in names if (value := read_definition(records[-1], name))}
        prompts = [record.prompt for record in records if record.prompt is not None]
        return {**({"prompt": prompts[-1]} if prompts and is_format(prompts[-1]) else {}), **found}

    def find(self, record: EvalRecord, *, step_known: bool) -> tuple[float | None, list[str]]:
        """The run's value at a record's step, if measured the same way; and notes about differences, each once.

        Without ``step_known`` the record's step is only a placeholder.
        """
        if not step_known:
            return None, [_UNKNOWN_STEP] if self._by_step else []
        live = self._by_step.get(record.step)
        if live is None or record.mir is None:
            return None, []
        then, now = ({name: read_definition(each, name) for name in _REMEDIES} for each in (live, record))
        changed = [name for name in _REMEDIES if None not in (then[name], now[name]) and then[name] != now[name]]
        notes = [
            f"{name} was {then[name]} during training and is {now[name]} now: {_REMEDIES[name]}"
            for name in changed
            if name not in self._noted
        ]
        self._noted.update(changed)
        return (live.mir if set(changed) <= set(CIRCUMSTANCES) else None), notes
