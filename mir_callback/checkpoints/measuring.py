# SPDX-License-Identifier: Apache-2.0
"""Measure one checkpoint: open it, evaluate, and make the record that a run measuring itself would have made."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mir_callback import collectives
from mir_callback.checkpoints.folders import Checkpoint, stamp_of
from mir_callback.checkpoints.hub import one_line
from mir_callback.checkpoints.loading import DTYPES, LoadOptions, open_checkpoint
from mir_callback.checkpoints.results import Results
from mir_callback.checkpoints.trainer_state import state_fields
from mir_callback.errors import ConfigError, MIRError, NumericsError
from mir_callback.evaluation import DEFAULT_BATCH_SIZE, encode_for, evaluate_encoded
from mir_callback.model.decoder import unwrap
from mir_callback.probe.batches import EncodedProbe
from mir_callback.probe.samples import Probe
from mir_callback.report import Wanted
from mir_callback.training.history import Record

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
