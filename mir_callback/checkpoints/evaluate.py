# SPDX-License-Identifier: Apache-2.0
"""Measure one checkpoint: open it, evaluate, and make the record that a run measuring itself would have made."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mir_callback import distributed as collectives
from mir_callback.checkpoints.discover import Checkpoint, stamp_of, state_fields
from mir_callback.checkpoints.load import DTYPES, LoadOptions, one_line, open_checkpoint
from mir_callback.checkpoints.results import Results
from mir_callback.errors import ConfigError, HistoryError, MIRError, NumericsError
from mir_callback.evaluation.evaluate import DEFAULT_BATCH_SIZE, Wanted, encode_for, evaluate_encoded
from mir_callback.history import FILE_NAME, Record, read_history
from mir_callback.model.decoder import unwrap
from mir_callback.probe.batches import EncodedProbe
from mir_callback.probe.probe import Probe
from mir_callback.probe.storage import RUN_PROBE

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


class LiveValues:
    """A run's own values, to be looked at beside those of its checkpoints.

    Args:
        run: the run's output folder, with or without a history.

    Attributes:
        problem: why there are none although there is a history, None otherwise.
    """

    def __init__(self, run: Path) -> None:
        self.problem: str | None = None
        self._by_step: dict[int, Record] = {}
        self._told: set[str] = set()
        path = run / FILE_NAME
        try:
            records = read_history(path) if path.exists() else []
        except (HistoryError, OSError) as error:
            self.problem = f"the values of the run itself cannot be shown beside: {error}"
            return
        self._by_step = {record["step"]: record for record in records if record["mir"] is not None}

    def beside(self, record: Mapping[str, Any], *, step_known: bool) -> tuple[float | None, list[str]]:
        """The live value of a record's step, and what to know before comparing the two.

        Args:
            record: of a checkpoint.
            step_known: whether the record's step is that of its weights, and not only where such values are put.

        Returns:
            The value, None if there is none that was made the same way; and sentences, each only the first time.
        """
        if not step_known:
            return None, [_UNKNOWN_STEP] if self._by_step else []
        live = self._by_step.get(record["step"])
        if live is None or record["mir"] is None:
            return None, []
        told = []
        comparable = True
        for field, remedy in _REMEDIES.items():
            theirs, ours = live.get(field), record.get(field)
            if theirs is None or ours is None or theirs == ours:
                continue
            comparable = comparable and field in ("pixels_fingerprint", "dtype")
            if field not in self._told:
                self._told.add(field)
                told.append(f"the run measured itself with {field} {theirs}, its checkpoints are with {ours}: {remedy}")
        return (float(live["mir"]) if comparable else None), told


def probe_of_run(run: Path) -> Probe:
    """The probe saved in a run's folder.

    Raises:
        ConfigError: there is none.
        ProbeError: it is damaged.
    """
    path = run / RUN_PROBE
    if not path.exists():
        raise ConfigError(
            f"a probe must be given, got none, and {path} is not there; give --probe FILE (mir probe --save writes "
            "one), or --images and --texts as the run was given them"
        )
    return Probe.load(path)


# A record is of the same measurement if these are.
_HOW = ("probe_fingerprint", "root", "loading", "weights_stamp")


@dataclass(frozen=True)
class MeasureOptions:
    """How checkpoints are measured.

    Attributes:
        loading: how they are opened.
        device: where they are evaluated; each rank has its own.
        autocast: a name of DTYPES other than float32 to evaluate in, as a run with `bf16=True` or `fp16=True` trains;
            None to evaluate in the weights' own dtype.
        batch_size: samples per forward on each rank.
        root: "exact" or "paper_fast".
    """

    loading: LoadOptions = field(default_factory=LoadOptions)
    device: torch.device = torch.device("cpu")
    autocast: str | None = None
    batch_size: int = DEFAULT_BATCH_SIZE
    root: str = "exact"


def known_record(checkpoint: Checkpoint, probe: Probe, options: MeasureOptions, results: Results) -> Record | None:
    """The record of the same measurement made before, None if there is none or it failed.

    Ranks: collective.
    """
    record = results.of_step(checkpoint.step)
    how: Mapping[str, Any] = {}
    with collectives.all_or_none():
        if collectives.is_main():
            how = _how(checkpoint, probe, options)
    how = collectives.broadcast_object(how)
    same = record is not None and record["mir"] is not None and all(record.get(name) == how[name] for name in _HOW)
    return record if same else None


def measure(checkpoint: Checkpoint, probe: Probe, options: MeasureOptions, results: Results) -> Record:
    """Evaluate one checkpoint and put its record among the results.

    Returns:
        The record; its `mir` is None and `error` says why where the hidden states define none.

    Raises:
        MIRError: the checkpoint cannot be opened, the probe does not fit it, its forward fails, or the results were
            made otherwise.

    Ranks: collective.
    """
    started = time.perf_counter()
    with collectives.all_or_none():
        how, known = _how(checkpoint, probe, options), state_fields(checkpoint)
        opened = open_checkpoint(checkpoint, options.loading, options.device)
    wanted = Wanted(root=options.root)
    with _fitting():
        encoded = encode_for(opened.model, probe, opened.adapter, batch_size=options.batch_size, wanted=wanted)
    results.require_same_definition(tokens_fingerprint=encoded.tokens_fingerprint)
    with collectives.all_or_none():
        _require_known_tokens(opened.model, encoded)
    loaded = time.perf_counter() - started
    try:
        with _fitting(), _autocast(options):
            report = evaluate_encoded(opened.model, encoded, opened.adapter, wanted=wanted)
        fields = report.as_dict()
        if not math.isfinite(report.mir):
            fields |= {"mir": None, "error": "every distance is zero: vision and text tokens cannot be told apart"}
    except NumericsError as error:  # the same on every rank
        fields = {"mir": None, "per_layer": None, "error": collectives.describe(error)}
        fields |= {"seconds": time.perf_counter() - started - loaded, "tokens_fingerprint": encoded.tokens_fingerprint}
    kept: Record = {"step": checkpoint.step, **known, **fields, **how}
    kept |= {"checkpoint": checkpoint.name, "load_seconds": loaded, "time": time.time()}
    results.put({**kept, "verdict": None, "reason": None})
    return kept


def _how(checkpoint: Checkpoint, probe: Probe, options: MeasureOptions) -> dict[str, Any]:
    loading = {**asdict(options.loading), "autocast": options.autocast}
    values = (probe.fingerprint, options.root, loading, stamp_of(checkpoint))
    return dict(zip(_HOW, values, strict=True))


@contextmanager
def _fitting() -> Iterator[None]:
    """Encoding and forwards, which fail in any way where a processor is of another model."""
    try:
        yield
    except MIRError:
        raise
    except Exception as error:
        if not collectives.is_shared(error):
            raise
        raise ConfigError(
            f"the forward must take what the processor makes, got {type(error).__name__}: {one_line(error)}; see "
            "whether --processor is the model's own, and memory enough for --batch-size"
        ) from error


def _autocast(options: MeasureOptions) -> Any:
    if options.autocast is None:
        return nullcontext()
    return torch.autocast(options.device.type, dtype=DTYPES[options.autocast])


def _require_known_tokens(model: nn.Module, encoded: EncodedProbe) -> None:
    """Refuse ids that the model has no embedding of: on a GPU they would end the process."""
    top: Any = unwrap(model)
    known = int(top.get_input_embeddings().weight.shape[0])
    for batch in encoded.batches:
        ids: Tensor = batch.inputs["input_ids"]
        if int(ids.max()) >= known:
            raise ConfigError(
                f"the processor must belong to the model, got token id {int(ids.max())} for a vocabulary of {known}; "
                "give --processor the folder or hub name of the model's own"
            )
