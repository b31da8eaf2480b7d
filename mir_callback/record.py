# SPDX-License-Identifier: Apache-2.0
"""One line of a history: every field once, with its type, rule, unit and meaning; reading, checking and writing it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

# What makes values comparable; a history continues only if these are the same.
DEFINITION_FIELDS = ("probe_fingerprint", "tokens_fingerprint", "root")
# What may move values a little without making them another number: said when it changes, not refused.
CIRCUMSTANCES = {
    "dtype": "dtype of the hidden states",
    "world_size": "number of ranks",
    "pixels_fingerprint": "pixel inputs (settings of the image processor, or the version of an image library)",
}
STOPPING = "plateau"  # the verdict that ends a run, as records hold it
_MAX_STEP = 2**53


def is_number(value: object) -> bool:
    """Whether a value is a finite number. Ranks: pure."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False


def _is_amount(value: Any) -> bool:
    return is_number(value) and value >= 0


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_STEP


def _are(rule: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, (list, tuple)) and bool(value) and all(map(rule, value))


def _are_lists(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(_are(is_number), value.values()))


# By name: what a value must be, in words, and whether it is.
_RULES: dict[str, tuple[str, Callable[[object], bool]]] = {
    "number": ("a finite number", is_number),
    "amount": ("a number of at least 0", _is_amount),
    "count": ("a whole number of at least 0", _is_count),
    "text": ("text", lambda value: isinstance(value, str)),
    "truth": ("true or false", lambda value: isinstance(value, bool)),
    "numbers": ("a list of numbers", _are(is_number)),
    "amounts": ("a list of numbers of at least 0", _are(_is_amount)),
    "counts": ("a list of whole numbers", _are(_is_count)),
    "lists": ("an object of lists of numbers", _are_lists),
    "object": ("an object", lambda value: isinstance(value, Mapping)),
}


def _field(rule: str, group: str, meaning: str, *, unit: str = "", always: bool = False) -> Any:
    """A field of a record; ``always``: written as null where it has no value, instead of being left out."""
    return field(default=None, metadata={"rule": rule, "group": group, "help": meaning, "unit": unit, "always": always})


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """One evaluation of a run, as a line of `mir_history.jsonl` holds it; None where a value is not known.

    ``record["mir"]`` reads a field by name, as in the line. ``unknown`` holds fields of other versions, which are kept.
    """

    step: int = field(metadata={"rule": "count", "group": "when", "help": "optimizer step", "unit": "", "always": True})
    epoch: float | None = _field("amount", "when", "epochs done, with fraction")
    mir: float | None = _field("number", "value", "log10 of the summed distances; null: failed, see error", always=True)
    mir_se: float | None = _field("amount", "value", "standard error of mir over draws of the probe", always=True)
    per_layer: list[float] | None = _field("amounts", "value", "distance of decoder layers 1 to K", always=True)
    per_layer_se: list[float] | None = _field("amounts", "value", "standard error of each distance")
    influences: list[float] | None = _field("numbers", "value", "of each sample of the probe on mir, to first order")
    companions: dict[str, list[float]] | None = _field("lists", "value", "what else tells of each layer, by name")
    probe_loss: float | None = _field("amount", "value", "mean loss on the probe's texts", unit="nats per token")
    error: str | None = _field("text", "value", "why there is no value")
    disabled: str | None = _field("text", "value", "why no further evaluations are tried in this process")

    root: str | None = _field("text", "definition", "how the root of the covariances was found: exact or paper_fast")
    probe_fingerprint: str | None = _field("text", "definition", "which probe: contents and encoding rules")
    tokens_fingerprint: str | None = _field("text", "definition", "which token ids it became")
    pixels_fingerprint: str | None = _field("text", "definition", "which pixel inputs its first images became")
    dtype: str | None = _field("text", "definition", "of the hidden states")
    num_samples: int | None = _field("count", "definition", "image and text pairs")
    num_vision_tokens: int | None = _field("count", "definition", "vision rows of each layer, over all ranks")
    num_text_tokens: int | None = _field("count", "definition", "text rows of each layer, over all ranks")
    vision_outliers: list[int] | None = _field("counts", "definition", "vision rows replaced in each layer")
    text_outliers: list[int] | None = _field("counts", "definition", "text rows replaced in each layer")

    seconds: float | None = _field("amount", "cost", "wall time of the evaluation on rank 0", unit="s")
    eval_seconds: float | None = _field("amount", "cost", "spent on evaluations so far, over restarts", unit="s")
    eval_cost: float | None = _field("amount", "cost", "what training waited for this evaluation", unit="s")
    train_seconds: float | None = _field("amount", "cost", "spent on training so far, over restarts", unit="s")
    step_seconds: float | None = _field("amount", "cost", "of a training step since the last evaluation", unit="s")
    world_size: int | None = _field("count", "cost", "ranks that took part")
    batch_size: int | None = _field("count", "cost", "samples of a forward, after what memory sufficed for")
    passes: int | None = _field("count", "cost", "times the probe was forwarded")
    storage_device: str | None = _field("text", "cost", "where rows waited: device, or host memory")
    peak_memory_bytes: int | None = _field("count", "cost", "most memory taken beyond what was held", unit="bytes")

    loss: float | None = _field("number", "training", "training loss logged last", always=True)
    loss_step: int | None = _field("count", "training", "the step it was logged at")
    samples_seen: int | None = _field("count", "training", "training samples so far, over all ranks")
    tokens_seen: float | None = _field("amount", "training", "input tokens so far, if the Trainer counts them")
    max_steps: float | None = _field("amount", "training", "planned length of the run", unit="steps")
    stage: str | None = _field("text", "training", "fingerprint of which parameters are trained")
    elapsed: float | None = _field("amount", "training", "since this process began to train", unit="s")
    time: float | None = _field("number", "training", "when it was written", unit="s since 1970")

    verdict: str | None = _field("text", "verdict", "of the stop rule: plateau means stopped", always=True)
    reason: str | None = _field("text", "verdict", "the figures behind it, as a sentence", always=True)
    would_stop: bool | None = _field(
        "truth", "verdict", "the rule found a plateau, or would have if it did not observe"
    )
    expected_gain: float | None = _field("number", "verdict", "by how much MIR would still fall within the horizon")
    expected_gain_se: float | None = _field("amount", "verdict", "its standard error")

    run: str | None = _field("text", "checkpoint", "whose checkpoint was measured, as a relative path")
    checkpoint: str | None = _field("text", "checkpoint", "its name")
    load_seconds: float | None = _field("amount", "checkpoint", "to open it", unit="s")
    loading: dict[str, Any] | None = _field("object", "checkpoint", "how it was opened")
    weights_stamp: str | None = _field("text", "checkpoint", "names, sizes and times of its files")

    unknown: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        """A field by its name in the history line; KeyError if there is none."""
        if name in FIELDS:
            return getattr(self, name)
        return self.unknown[name]

    @property
    def is_trained(self) -> bool:
        """Whether its weights may be the best ones: measured, and after a training step."""
        return self.step > 0 and self.mir is not None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], damaged: list[str] | None = None) -> EvalRecord:
        """A record of a mapping, as JSON gives it.

        Args:
            values: fields by name. Unknown ones are kept in ``unknown``.
            damaged: gets a sentence for each known field that breaks its rule, which is then left out; None to raise.

        Raises:
            ValueError: no whole `step`, a `mir` that is neither a finite number nor null, or with ``damaged`` None any
                other field that breaks its rule.

        Ranks: pure.
        """
        if not _is_count(values.get("step")):
            raise ValueError("not an object with a whole step")
        if "mir" not in values or not (values["mir"] is None or is_number(values["mir"])):
            raise ValueError("its mir is neither a number nor null")
        known: dict[str, Any] = {}
        for name, value in values.items():
            if name not in FIELDS or value is None:
                continue
            words, holds = _RULES[FIELDS[name].metadata["rule"]]
            if holds(value):
                known[name] = value
                continue
            told = f"step {values['step']}: {name} is left out, it must be {words}, got {value!r:.60}"
            if damaged is None:
                raise ValueError(told)
            damaged.append(told)
        count = known.get("num_samples")
        if "influences" in known and count not in (None, len(known["influences"])):
            told = f"step {values['step']}: {len(known.pop('influences'))} influences for {count} samples are left out"
            if damaged is None:
                raise ValueError(told)
            damaged.append(told)
        return cls(**known, unknown={name: value for name, value in values.items() if name not in FIELDS})

    @classmethod
    def from_line(cls, line: str, damaged: list[str] | None = None) -> EvalRecord:
        """A record of a history line; as :meth:`from_dict`, and ValueError if it is no JSON object. Ranks: pure."""
        try:
            values = json.loads(line, parse_constant=_refuse_constant)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        return cls.from_dict(values, damaged)

    def checked(self) -> tuple[EvalRecord, list[str]]:
        """What can be read back of it, numbers of NumPy and torch as Python's; a sentence for each field left out."""
        found, damaged = {name: _plain(getattr(self, name)) for name in FIELDS}, list[str]()
        return replace(EvalRecord.from_dict(found, damaged), unknown=self.unknown), damaged

    def to_dict(self) -> dict[str, Any]:
        """The fields that have a value, and null for those every line has; what is not finite is null."""
        known = {name: _finite(getattr(self, name)) for name in FIELDS}
        kept = {n: value for n, value in known.items() if value is not None or FIELDS[n].metadata["always"]}
        return kept | {name: _finite(value) for name, value in self.unknown.items()}

    def to_line(self) -> str:
        """The line of the history, with its end."""
        return json.dumps(self.to_dict(), allow_nan=False) + "\n"


FIELDS = {each.name: each for each in fields(EvalRecord) if each.name != "unknown"}


def as_records(records: Iterable[EvalRecord | Mapping[str, Any]]) -> list[EvalRecord]:
    """Records of records or mappings; of a mapping what breaks its rule counts as not known, also a NaN as `mir`.

    Raises:
        ValueError: a mapping without a whole `step`.
    """
    found = []
    for each in records:
        if not isinstance(each, EvalRecord):
            mir = each.get("mir")
            each = EvalRecord.from_dict({**each, "mir": mir if is_number(mir) else None}, [])
        found.append(each)
    return found


def lowest_record(records: Iterable[EvalRecord]) -> EvalRecord | None:
    """The trained record with the lowest MIR, the earliest of equal ones; None if there is none. Ranks: pure."""
    trained = (record for record in records if record.is_trained)
    return min(trained, key=lambda record: float(record.mir or 0.0), default=None)


def is_stopped(records: Sequence[EvalRecord]) -> bool:
    """Whether the run ended on its stop rule at its newest record. Ranks: pure."""
    return bool(records) and records[-1].verdict == STOPPING


def since_last_stop(records: Sequence[EvalRecord]) -> Sequence[EvalRecord]:
    """The records a rule judges: those after the last stop, which a run that has more of them was told to go past.

    Ranks: pure.
    """
    starts = [number for number, record in enumerate(records, start=1) if record.verdict == STOPPING]
    return records[starts[-1] :] if starts else records


def changed_circumstances(earlier: Sequence[EvalRecord], record: EvalRecord) -> str | None:
    """What differs between a record and the values before it, as a sentence; None if nothing does.

    Fields that an earlier record lacks, as a failed evaluation's does, are looked for further back. Ranks: pure.
    """
    told = []
    for name, meaning in CIRCUMSTANCES.items():
        known = [past for past in earlier if past[name] is not None]
        if known and record[name] is not None and known[-1][name] != record[name]:
            told.append(f"{meaning}: {known[-1][name]} up to step {known[-1].step}, now {record[name]}")
    if not told:
        return None
    return (
        f"step {record.step}: MIR is measured otherwise than before, so a jump of its curve here may be no change of "
        f"the model: {'; '.join(told)}"
    )


def _plain(value: Any) -> Any:
    """A number of NumPy or torch as one of Python, and null for one that is not finite."""
    try:
        value = value.item() if callable(getattr(value, "item", None)) else value
    except (RuntimeError, TypeError, ValueError):  # an array: breaks its field's rule
        return value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _finite(value: Any) -> Any:
    """A value with null in the place of every number that is not finite."""
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return None if any(isinstance(inner, float) and not math.isfinite(inner) for inner in value) else list(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
