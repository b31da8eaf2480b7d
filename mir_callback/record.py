# SPDX-License-Identifier: Apache-2.0
"""One line of a history: every field once, with type, valid range, unit and meaning; read, validate, write."""

from __future__ import annotations

import json
import math
import re
import sys
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, TypeGuard

# What makes values comparable; a history continues only if these are the same.
DEFINITION_FIELDS = ("probe_fingerprint", "text_positions", "text_only", "vision_ids", "tokens_fingerprint", "root")
# The same with what says why token ids differ, which older histories and other adapters may lack.
DESCRIBED_FIELDS = ("probe_fingerprint", "prompt", *DEFINITION_FIELDS[1:])
# What fields were before records named them.
_BEFORE = {"text_positions": "after_image", "text_only": "leave_out", "vision_ids": ""}
# These may change values slightly: a change of one is reported, not refused.
CIRCUMSTANCES = {
    "dtype": "dtype of the hidden states",
    "world_size": "number of ranks",
    "pixels_fingerprint": "pixel inputs (settings of the image processor, or the version of an image library)",
}
STOPPING = "plateau"  # the verdict that ends a run, as records hold it
JUMPS = 1.5  # outlier_se_ratio from which MIR jumps between probes
_MAX_STEP = 2**53
_LARGEST = 1e100  # above any real value, and its square is still a float
_MAX_DEPTH = 20  # of nested JSON
_LONGEST = 2**22  # characters of a line; a thousand samples and a hundred layers take 20,000
_TOO_DEEP = f"JSON nested more than {_MAX_DEPTH} levels deep"


def is_number(value: object) -> bool:
    """Whether a value is a number that can be computed with: no bool, no NaN, nothing beyond 1e100. Ranks: pure."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def _is_amount(value: Any) -> bool:
    return is_number(value) and value >= 0


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value is an integer from 0 to 2**53, such as a step. Ranks: pure."""
    return type(value) is int and 0 <= value < _MAX_STEP


def is_seed(value: object) -> TypeGuard[int]:
    """Whether a value is an integer that torch takes as a seed. Ranks: pure."""
    return type(value) is int and -(2**63) <= value < 2**64


def _are_counts(value: Any) -> bool:
    return _is_list(value) and set(map(type, value)) == {int} and 0 <= min(value) and max(value) < _MAX_STEP


def _are_numbers(value: Any, least: float = -math.inf) -> bool:
    """As :func:`is_number` of each, in a tenth of the time, as a long history has millions of numbers."""
    if not _is_list(value):
        return False
    types = set(map(type, value))
    if bool in types or not all(issubclass(each, (int, float)) for each in types):
        return False
    # Unless it is the first, NaN passes the bounds.
    lowest = min(value)
    return bool(least <= lowest and -_LARGEST < lowest and max(value) < _LARGEST and not math.isnan(sum(value)))


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value)


def _are_lists(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(_are_numbers, value.values()))


# By name: what a value has to be, and the test of it.
_RULES: dict[str, tuple[str, Callable[[object], bool]]] = {
    "number": ("a finite number", is_number),
    "amount": ("a number of at least 0", _is_amount),
    "count": ("an integer of at least 0", is_count),
    "seed": ("an integer of at most 64 bits", is_seed),
    "text": ("a string", lambda value: isinstance(value, str)),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "numbers": ("a list of numbers", _are_numbers),
    "amounts": ("a list of numbers of at least 0", partial(_are_numbers, least=0)),
    "counts": ("a list of integers", _are_counts),
    "lists": ("an object of lists of numbers", _are_lists),
    "object": ("an object", lambda value: isinstance(value, Mapping)),
}


def _field(rule: str, group: str, meaning: str, *, unit: str = "", always: bool = False, digits: int = 0) -> Any:
    """A field of a record; with ``always`` a missing value is written as null instead of being left out.

    With ``digits`` numbers of a measured value have so many significant digits; see :func:`shorten`.
    """
    about = {"rule": rule, "group": group, "help": meaning, "unit": unit, "always": always, "digits": digits}
    return field(default=None, metadata=about)


@dataclass(frozen=True, kw_only=True, slots=True)  # a dict of so many fields takes five times as much memory
class EvalRecord:
    """One evaluation, as a line of `mir_history.jsonl` stores it; a field without a value is None.

    docs/reference.md lists the fields with units. ``record["mir"]`` reads a field by its name in the file; fields
    written by other versions are in ``unknown`` and are kept when a run is resumed.

    Example:
        >>> record = EvalRecord.from_line('{"step": 50, "mir": 2.5, "per_layer": [120.0, 196.2], "seconds": 0.6}')
        >>> record.step, record.mir, record["seconds"], record.mir_se
        (50, 2.5, 0.6, None)
    """

    step: int = field(metadata={"rule": "count", "group": "when", "help": "optimizer step", "unit": "", "always": True})
    epoch: float | None = _field("amount", "when", "epochs done, with fraction")
    mir: float | None = _field("number", "value", "log10 of the summed distances; null: failed, see error", always=True)
    mir_se: float | None = _field("amount", "value", "standard error of mir over draws of the probe", always=True)
    per_layer: list[float] | None = _field("amounts", "value", "distance of decoder layers 1 to K", always=True)
    per_layer_se: list[float] | None = _field("amounts", "value", "standard error of each distance", digits=5)
    outlier_se_ratio: float | None = _field(
        "amount", "value", "mir_se over the error with replaced rows as given; from 1.5 on mir jumps between probes"
    )
    influences: Sequence[float] | None = _field("numbers", "value", "of each sample on mir, outlier rule included")
    companions: dict[str, list[float]] | None = _field(
        "lists", "value", "further quantities of each layer, by name", digits=5
    )
    scale_free_mir: float | None = _field("number", "value", "mir with vision scaled to the mean norm of text")
    probe_loss: float | None = _field("amount", "value", "mean loss on the probe's texts", unit="nats per token")
    vision_gain: float | None = _field(
        "number", "value", "that loss with other samples' images minus with the right ones", unit="nats per token"
    )
    vision_gain_se: float | None = _field("amount", "value", "standard error of vision_gain", unit="nats per token")
    vision_gain_influences: Sequence[float] | None = _field("numbers", "value", "of each sample on vision_gain")
    error: str | None = _field("text", "value", "why the evaluation failed")
    disabled: str | None = _field("text", "value", "why this process makes no further evaluations")

    root: str | None = _field("text", "definition", "how the matrix square root was computed: exact or paper_fast")
    probe_fingerprint: str | None = _field("text", "definition", "hash of the probe: samples and encoding rules")
    text_positions: str | None = _field(
        "text", "definition", "which positions counted as text: after_image (also if null), or all"
    )
    text_only: str | None = _field("text", "definition", "samples without an image: leave_out (also if null), or count")
    vision_ids: str | None = _field("text", "definition", "ids of vision tokens, where they were given")
    prompt: str | None = _field("text", "definition", "what was put around image and text, as a format string")
    first_sample: str | None = _field("text", "definition", "its first sample with an image, as the model gets it")
    tokens_fingerprint: str | None = _field("text", "definition", "hash of the token ids of the probe")
    pixels_fingerprint: str | None = _field("text", "definition", "hash of the pixel inputs of its first images")
    dtype: str | None = _field("text", "definition", "dtype of the hidden states")
    num_samples: int | None = _field("count", "definition", "samples of the probe that were measured")
    num_vision_tokens: int | None = _field("count", "definition", "vision tokens of each layer, over all ranks")
    num_text_tokens: int | None = _field("count", "definition", "text tokens of each layer, over all ranks")
    vision_outliers: list[int] | None = _field("counts", "definition", "vision tokens replaced in each layer")
    text_outliers: list[int] | None = _field("counts", "definition", "text tokens replaced in each layer")

    seconds: float | None = _field("amount", "cost", "wall time of the evaluation on rank 0", unit="s")
    eval_seconds: float | None = _field("amount", "cost", "time of all evaluations so far, over restarts", unit="s")
    eval_cost: float | None = _field("amount", "cost", "how long training waited for this evaluation", unit="s")
    train_seconds: float | None = _field("amount", "cost", "time of training so far, over restarts", unit="s")
    step_seconds: float | None = _field("amount", "cost", "time of a training step since the last evaluation", unit="s")
    world_size: int | None = _field("count", "cost", "number of ranks")
    batch_size: int | None = _field("count", "cost", "probe samples per forward, as far as memory allowed")
    passes: int | None = _field("count", "cost", "forward passes over the probe")
    storage_device: str | None = _field("text", "cost", "where hidden states were kept: device, or host memory")
    peak_memory_bytes: int | None = _field("count", "cost", "peak memory beyond what was in use before", unit="bytes")

    loss: float | None = _field("number", "training", "last training loss logged", always=True)
    loss_step: int | None = _field("count", "training", "step of that loss")
    samples_seen: int | None = _field("count", "training", "training samples so far, over all ranks")
    tokens_seen: float | None = _field("amount", "training", "input tokens so far, if the Trainer counts them")
    max_steps: float | None = _field("amount", "training", "planned length of the run", unit="steps")
    next_drop: int | None = _field("count", "training", "next drop of the learning rate, at this step or later")
    next_epoch: int | None = _field("count", "training", "next beginning of an epoch, at this step or later")
    stage: str | None = _field("text", "training", "hash of the names of the trained parameters")
    seed: int | None = _field("seed", "training", "seed of the run; mir compare pairs runs by it")
    data_seed: int | None = _field("seed", "training", "seed of the order of the data, if it has one of its own")
    elapsed: float | None = _field("amount", "training", "time since this process began to train", unit="s")
    time: float | None = _field("number", "training", "when it was written", unit="s since 1970")

    verdict: str | None = _field("text", "verdict", "verdict of the stop rule; plateau: run stopped", always=True)
    reason: str | None = _field("text", "verdict", "the figures behind the verdict, as a sentence", always=True)
    would_stop: bool | None = _field("bool", "verdict", "whether the rule found a plateau, also with observe_only")
    expected_gain: float | None = _field("number", "verdict", "expected fall of MIR within the horizon")
    expected_gain_se: float | None = _field("amount", "verdict", "standard error of expected_gain")
    contradiction: str | None = _field("text", "verdict", "what vision gain says against MIR, as a sentence")

    run: str | None = _field("text", "checkpoint", "run of the checkpoint, as a relative path")
    checkpoint: str | None = _field("text", "checkpoint", "name of the checkpoint")
    load_seconds: float | None = _field("amount", "checkpoint", "time to load the checkpoint", unit="s")
    loading: dict[str, Any] | None = _field("object", "checkpoint", "options it was loaded with")
    weights_stamp: str | None = _field("text", "checkpoint", "hash of names, sizes and times of its files")

    unknown: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        """A field by its name in the history line; KeyError if there is none."""
        if name in FIELDS:
            return getattr(self, name)
        return self.unknown[name]

    @property
    def is_after_start(self) -> bool:
        """Whether it has a MIR and was made after the first optimizer step, so that its weights may be the best."""
        return self.step > 0 and self.mir is not None

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], damaged: list[str] | None = None, *, brief: bool = False
    ) -> EvalRecord:
        """Build a record from a mapping, such as a parsed JSON object.

        Args:
            values: fields by name. Unknown ones are kept in ``unknown``.
            damaged: collects a message for each other field with an invalid value, which is left out; None to raise.
            brief: leave out values of layers and unknown lists and objects, and keep influences as an `array`, in a
                fifth of the memory of a list.

        Raises:
            ValueError: `step` is no integer, `mir` is neither a number nor null, JSON is nested too deeply, or, with
                ``damaged`` None, another field has an invalid value.

        Ranks: pure.
        """
        if not is_count(values.get("step")):
            raise ValueError("it has no integer step")
        if "mir" not in values or not (values["mir"] is None or is_number(values["mir"])):
            raise ValueError("its mir is neither a number nor null")
        unknown = {name: _finite(value) for name, value in values.items() if name not in FIELDS}
        if brief:
            unknown = {name: value for name, value in unknown.items() if not isinstance(value, (dict, list))}
        _finite(values.get("loading"))
        known: dict[str, Any] = {}
        for name, value in values.items():
            if value is None or name not in FIELDS or (brief and name in _OF_LAYERS):
                continue
            expected, is_valid = _EXPECTED[name]
            if is_valid(value):
                known[name] = sys.intern(value) if type(value) is str else value  # most are the same in all records
                continue
            message = f"step {values['step']}: ignored {name}={value!r:.60}, expected {expected}"
            if damaged is None:
                raise ValueError(message)
            damaged.append(message)
        count = known.get("num_samples")
        for name in [name for name in _OF_SAMPLES if name in known]:
            if count not in (None, len(known[name])):
                message = f"step {values['step']}: ignored {len(known.pop(name))} {name} of {count} samples"
                if damaged is None:
                    raise ValueError(message)
                damaged.append(message)
            elif brief:
                known[name] = array("d", known[name])
        return cls(**known, unknown=unknown)

    @classmethod
    def from_line(cls, line: str, damaged: list[str] | None = None, *, brief: bool = False) -> EvalRecord:
        """Parse a history line; see :meth:`from_dict`. ValueError if it is no JSON object. Ranks: pure.

        With ``brief`` most of the line, the values of layers, is not even parsed, which takes a third of the time.
        """
        if len(line) > _LONGEST:
            raise ValueError(f"{len(line)} characters, more than {_LONGEST}")
        try:
            if brief:
                line = _LAYERS_IN_LINE.sub(r"\1\2null", line)
            values = _DECODER.decode(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from error
        except RecursionError as error:
            raise ValueError(_TOO_DEEP) from error
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        return cls.from_dict(values, damaged, brief=brief)

    def checked(self) -> tuple[EvalRecord, list[str]]:
        """The record as it will be read back, with NumPy and torch numbers as Python's; a message per invalid field."""
        found, damaged = {name: _plain(getattr(self, name)) for name in FIELDS}, list[str]()
        return replace(EvalRecord.from_dict(found, damaged), unknown=self.unknown), damaged

    def to_dict(self) -> dict[str, Any]:
        """Its fields for JSON: without those that have no value, and null for what is not finite."""
        known = {name: _finite(getattr(self, name)) for name in FIELDS}
        kept = {n: value for n, value in known.items() if value is not None or FIELDS[n].metadata["always"]}
        return kept | {name: _finite(value) for name, value in self.unknown.items()}

    def to_line(self) -> str:
        """The line of the history, newline included."""
        return json.dumps(self.to_dict(), allow_nan=False, separators=(",", ":")) + "\n"


FIELDS = {each.name: each for each in fields(EvalRecord) if each.name != "unknown"}
_DIGITS = {name: each.metadata.get("digits", 0) for name, each in FIELDS.items()}
_EXPECTED = {name: _RULES[each.metadata["rule"]] for name, each in FIELDS.items()}
_OF_SAMPLES = ("influences", "vision_gain_influences")
_OF_LAYERS = ("per_layer", "per_layer_se", "companions", "vision_outliers", "text_outliers")
# Such fields in a line, as this package writes them; what looks different is parsed with the rest of the line. Within a
# string of JSON there is no match, as a quotation mark has a backslash there.
_NUMBERS = r"\[[-+.eE0-9, ]*\]"
_LAYERS_IN_LINE = re.compile(
    rf'("(?:per_layer|per_layer_se|vision_outliers|text_outliers)": ?){_NUMBERS}|'
    rf'("companions": ?)\{{(?:"[^"\\]*": ?{_NUMBERS}(?:, ?|(?=\}})))*\}}'
)


def shorten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Measured fields without the digits that say nothing, before anything is done with them.

    What is in memory is then what is on disk. `mir`, `per_layer` and `mir_se` keep all digits.
    """
    return {name: _shorten(value, digits) if (digits := _DIGITS.get(name)) else value for name, value in values.items()}


def read_definition(values: EvalRecord | Mapping[str, Any], name: str) -> Any:
    """One of DESCRIBED_FIELDS of a record, or of what was noted of one; None if it is not known. Ranks: pure.

    Values of the time before records had a field were made as is the default now.

    Example:
        >>> read_definition(EvalRecord(step=1, mir=2.0), "text_positions")
        'after_image'
    """
    if isinstance(values, EvalRecord):
        value, is_measured = values[name], values.mir is not None
    else:
        value, is_measured = values.get(name), True
    return _BEFORE.get(name) if value is None and is_measured else value


def as_records(records: Iterable[EvalRecord | Mapping[str, Any]]) -> list[EvalRecord]:
    """Turn mappings into records; their invalid fields, a `mir` of NaN included, become None.

    Raises:
        ValueError: a mapping without an integer `step`.
    """
    found = []
    for each in records:
        if not isinstance(each, EvalRecord):
            mir = each.get("mir")
            each = EvalRecord.from_dict({**each, "mir": mir if is_number(mir) else None}, [])
        found.append(each)
    return found


def lowest_record(records: Iterable[EvalRecord]) -> EvalRecord | None:
    """The record with the lowest MIR after step 0, the earliest of equal ones; None if there is none. Ranks: pure."""
    later = (record for record in records if record.is_after_start)
    return min(later, key=lambda record: float(record.mir or 0.0), default=None)


def is_stopped(records: Sequence[EvalRecord]) -> bool:
    """Whether the newest record is the one the stop rule ended the run at. Ranks: pure."""
    return bool(records) and records[-1].verdict == STOPPING


def since_last_stop(records: Sequence[EvalRecord]) -> Sequence[EvalRecord]:
    """The records a rule judges: those after the last stop, if training was continued past it. Ranks: pure."""
    starts = [number for number, record in enumerate(records, start=1) if record.verdict == STOPPING]
    return records[starts[-1] :] if starts else records


def changed_circumstances(earlier: Sequence[EvalRecord], record: EvalRecord) -> str | None:
    """A message if dtype, ranks or pixel inputs differ from those of the values before; None if they do not.

    A field is compared with the last record that has it. Ranks: pure.
    """
    changes = []
    for name, meaning in CIRCUMSTANCES.items():
        known = [past for past in earlier if past[name] is not None]
        if known and record[name] is not None and known[-1][name] != record[name]:
            changes.append(f"{meaning}: {known[-1][name]} up to step {known[-1].step}, now {record[name]}")
    if not changes:
        return None
    return (
        f"step {record.step}: the conditions of the measurement have changed, a jump of MIR here may come from that: "
        f"{'; '.join(changes)}"
    )


def explain_jumps(earlier: Sequence[EvalRecord], record: EvalRecord) -> str | None:
    """A message if outliers decide a record's error, and none of the values before had one. Ranks: pure."""
    ratio = record.outlier_se_ratio
    if ratio is None or ratio < JUMPS or any((each.outlier_se_ratio or 0.0) >= JUMPS for each in earlier):
        return None
    return (
        f"step {record.step}: many tokens of the probe lie near the limit of the 3-sigma rule, and another probe would "
        f"have other outliers: mir_se is {ratio:.1f} times as large for it. Values of this probe compare as usual, "
        "those of another may jump. More samples, or samples more alike, help"
    )


def is_newly_contradicted(earlier: Sequence[EvalRecord], record: EvalRecord) -> bool:
    """Whether a record is the first one of its training stage with a contradiction. Ranks: pure."""
    same = (old for old in earlier if old.stage == record.stage)
    return record.contradiction is not None and all(old.contradiction is None for old in same)


def _plain(value: Any) -> Any:
    """A NumPy or torch number as Python's; None if it is not finite."""
    try:
        value = value.item() if callable(getattr(value, "item", None)) else value
    except (RuntimeError, TypeError, ValueError):  # an array, which is found invalid later
        return value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shorten(value: Any, digits: int) -> Any:
    if isinstance(value, Mapping):
        return {name: _shorten(inner, digits) for name, inner in value.items()}
    return None if value is None else [float(f"{number:.{digits}g}") for number in value]


def _finite(value: Any, depth: int = _MAX_DEPTH) -> Any:
    """A JSON value with None for numbers and lists of numbers that are not finite; ValueError if nested too deeply."""
    if depth == 0:
        raise ValueError(_TOO_DEEP)
    if isinstance(value, Mapping):
        return {name: _finite(inner, depth - 1) for name, inner in value.items()}
    if isinstance(value, (list, tuple, array)):
        if any(isinstance(inner, float) and not math.isfinite(inner) for inner in value):
            return None
        return [_finite(inner, depth - 1) if isinstance(inner, (Mapping, list, tuple)) else inner for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
