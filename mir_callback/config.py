# SPDX-License-Identifier: Apache-2.0
"""Every option once: type, default, help and valid range. Keyword arguments and flags are made from it."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from mir_callback.early_stopping import PlateauRule
from mir_callback.errors import ConfigError
from mir_callback.metric.frechet import check_root
from mir_callback.model.modality import AFTER_IMAGE, LEAVE_OUT, TEXT_ONLY, TEXT_POSITIONS, parse_ids, write_ids
from mir_callback.probe.probe import ProbeSource
from mir_callback.probe.prompt import check_prompt
from mir_callback.schedule import (
    DEFAULT_EVENTS,
    EveryEpochs,
    Schedule,
    TimeShare,
    as_schedule,
    check_events,
    describe,
    due_steps,
)

T = TypeVar("T")

GROUPS = {
    "measure": "what is measured",
    "when": "when it is measured",
    "stop": "when training stops",
    "memory": "memory",
    "failures": "failures",
    "log": "what is printed",
    "keep": "what is kept",
}
STOP_RULES = ("none", "observe", "plateau")
ON_ERROR = ("warn", "raise")
DEFAULT_WATCHDOG_SECONDS = 600.0


def _option(value: Any, group: str, help_: str, /, **flag: Any) -> Any:
    """A field of :class:`MIRConfig`; ``type``, ``default`` and ``none`` say where its flag differs from it.

    ``none`` is the value on the command line that stands for None.
    """
    return field(default=value, metadata={"group": group, "help": help_, "flag": flag})


@dataclass(frozen=True, kw_only=True)
class MIRConfig:
    """All options of a run: what is measured, when, when training stops, and what is kept.

    `MIRMonitor`, `MIRCallback` and `attach_mir` take these fields as keyword arguments, `evaluate_mir` those of the
    groups "measure" and "memory". As flags they are called `--mir_NAME`, see :class:`MIRArguments`. docs/reference.md
    lists them with defaults and units.

    Raises:
        ConfigError: an option has an invalid value.

    Ranks: any; the same options on every rank.

    Example:
        >>> MIRConfig(every="0.1ep", stop="plateau").schedule
        EveryEpochs(epochs=0.1)
    """

    root: str = _option("exact", "measure", "exact, or paper_fast to compare with published values")
    standard_error: bool = _option(
        True, "measure", "also estimate how much MIR varies with the choice of samples (exact only)"
    )
    probe_loss: bool = _option(False, "measure", "also compute the loss on the probe's texts")
    vision_gain: bool = _option(
        False,
        "measure",
        "also compute by how much other samples' images raise that loss, with a second forward; the probe's texts have "
        "to belong to its images",
    )
    prompt: str | None = _option(
        None,
        "measure",
        "plain: image, then text; chat: the processor's chat template; or a format string with {image} and {text}; in "
        "LLaVA's code bases also the name of a conversation (default: plain, there the run's own conversation)",
    )
    text_positions: str = _option(
        AFTER_IMAGE,
        "measure",
        "after_image: the text after a sample's last image, as in the paper; all: every position that is no image "
        "feature, but special tokens at the beginning",
    )
    vision_ids: str | None = _option(
        None,
        "measure",
        "ids of vision tokens, such as 4-8195,8200, for models whose configuration does not name them (default: the "
        "configuration's)",
    )
    text_only: str = _option(
        LEAVE_OUT,
        "measure",
        "samples of the probe without an image: leave_out: they are not measured; count: their tokens count as text",
    )

    every: int | str | Schedule = _option(
        50,
        "when",
        "50 (optimizer steps), 0.1ep (epochs), log5 (5 per power of ten), 5% (at most, of the time) or 10,100,1000 "
        "(these steps)",
        type=str,
        default="50",
    )
    also_on: Collection[str] = _option(
        DEFAULT_EVENTS,
        "when",
        "events to evaluate at as well: any of start,end,evaluate,save, or none",
        type=str,
        default=",".join(DEFAULT_EVENTS),
    )
    dry_run: bool = _option(False, "when", "evaluate once before the first step, print the cost, and exit")

    stop: Any = _option(
        None,
        "stop",
        "none: never; plateau: when MIR no longer falls; observe: only log when it would",
        type=str,
        default="none",
    )
    continue_after_stop: bool = _option(False, "stop", "train on when resuming a run that was stopped on its plateau")

    batch_size: int = _option(4, "memory", "probe samples per forward on each rank; halved when memory runs out")
    capture_budget_gb: float | None = _option(
        None, "memory", "GB of hidden states to keep on each rank's device (default: half of what is free)"
    )

    on_error: str = _option("warn", "failures", "warn: only a failed first evaluation ends the run; raise: any does")
    max_failures: int | None = _option(
        3, "failures", "stop evaluating after this many failures in a row; 0 for no limit", none=0
    )
    watchdog_seconds: float | None = _option(
        DEFAULT_WATCHDOG_SECONDS,
        "failures",
        "report where ranks are stuck when a phase of an evaluation takes longer; 0 for never",
        none=0.0,
    )
    abort_on_hang: bool = _option(False, "failures", "end the process with exit code 86 after such a report")

    log_layers: bool = _option(False, "log", "also print the distance of each layer; trackers get them anyway")

    save_probe: bool = _option(True, "keep", "save the probe as OUTPUT_DIR/mir_probe.zip")
    keep_best: bool = _option(False, "keep", "save the weights with the lowest MIR to OUTPUT_DIR/mir_best")

    def __post_init__(self) -> None:
        """Validate every option."""
        for each in fields(self):
            if isinstance(each.default, bool) and not isinstance(getattr(self, each.name), bool):
                raise ConfigError(f"{each.name} must be True or False, got {getattr(self, each.name)!r}")
        check_root(self.root)
        check_prompt(self.prompt)
        if ids := parse_ids(self.vision_ids):
            object.__setattr__(self, "vision_ids", write_ids(ids))  # 3,4 and 3-4 are one definition
        for name, known in (("text_positions", TEXT_POSITIONS), ("text_only", TEXT_ONLY)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        object.__setattr__(self, "every", as_schedule(self.every))
        object.__setattr__(self, "also_on", check_events(self.also_on))
        object.__setattr__(self, "stop", _stop_rule(self.stop))
        _check_count("batch_size", self.batch_size, "samples")
        _check_positive("capture_budget_gb", self.capture_budget_gb, "GB, or None for half of what is free")
        if self.on_error not in ON_ERROR:
            raise ConfigError(f"on_error must be one of {', '.join(ON_ERROR)}, got {self.on_error!r}")
        if self.max_failures is not None:
            _check_count("max_failures", self.max_failures, "failures in a row, or None for no limit")
        _check_positive("watchdog_seconds", self.watchdog_seconds, "seconds, or None for no watchdog")
        if self.abort_on_hang and self.watchdog_seconds is None:
            raise ConfigError("abort_on_hang=True needs the watchdog. Set watchdog_seconds, e.g. to 600.")

    @classmethod
    def from_options(cls, options: Mapping[str, Any], groups: Collection[str] = tuple(GROUPS)) -> MIRConfig:
        """Build the configuration from keyword arguments; only options of ``groups`` are accepted.

        Raises:
            ConfigError: an option is unknown or has an invalid value.
        """
        known = [each.name for each in fields(cls) if each.metadata["group"] in groups]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean {near[0]}?" if near else f"Options: {', '.join(known)}."
                raise ConfigError(f"Unknown option {name!r}. {hint}")
        return cls(**options)

    @property
    def schedule(self) -> Schedule:
        """When to evaluate."""
        return self.every  # type: ignore[return-value]  # made one on construction

    @property
    def encoding(self) -> dict[str, Any]:
        """The options by which an adapter encodes samples: keyword arguments of `find_adapter`."""
        return {"prompt": self.prompt, "text_positions": self.text_positions, "vision_ids": self.vision_ids}

    @property
    def num_losses(self) -> int:
        """Losses of the texts that an evaluation measures: none, with the right images, and with others too."""
        return 2 if self.vision_gain else int(self.probe_loss)

    @property
    def may_stop(self) -> bool:
        """Whether there is a stop rule, and not one that only observes."""
        return self.stop is not None and not getattr(self.stop, "observe_only", False)

    def planned_steps(self, total_steps: int | None, total_epochs: float | None = None) -> list[int] | None:
        """The steps evaluated in a run of this length, events that aren't steps left out; None if unknown.

        Example:
            >>> MIRConfig(every=500).planned_steps(2000)
            [0, 500, 1000, 1500, 2000]
        """
        needs_epochs = isinstance(self.schedule, EveryEpochs) and total_epochs is None
        if not total_steps or needs_epochs or isinstance(self.schedule, TimeShare):
            return None
        at_events = [step for event, step in (("start", 0), ("end", total_steps)) if event in self.also_on]
        return sorted({*due_steps(self.schedule, total_steps, total_epochs or 1.0), *at_events})

    def for_trackers(self) -> dict[str, str]:
        """The options that experiment trackers show among the settings of a run."""
        described = self.described()
        return {"every": described["every"], "also_on": ", ".join(self.also_on), "stop": described["stop"]}

    def described(self) -> dict[str, Any]:
        """Options as plain values to compare between ranks; a schedule or rule of the user's own by its class."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        ours = self.stop is None or isinstance(self.stop, PlateauRule)
        values["every"] = describe(self.schedule)
        values["stop"] = repr(self.stop) if ours else type(self.stop).__qualname__
        return values


def with_options(function: Callable[..., T], groups: Collection[str] = tuple(GROUPS)) -> Callable[..., T]:
    """Show the options in the signature of a function that takes ``**options``, for `help` and editors."""
    signature = inspect.signature(function)
    own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    more = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
        for each in fields(MIRConfig)
        if each.metadata["group"] in groups and each.name not in signature.parameters
    ]
    function.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
    return function


class _Arguments:
    """The methods of :class:`MIRArguments`, whose fields are made from the options."""

    def __post_init__(self) -> None:
        """Validate the flags; reads no files."""
        self.probe_source()
        self.options()

    @property
    def enabled(self) -> bool:
        """Whether a probe was given, which switches MIR on."""
        return self.probe_source().is_given

    def probe_source(self) -> ProbeSource:
        """Where the probe comes from; ``.load()`` reads it. ConfigError if the flags contradict each other."""
        return ProbeSource(**{each.name: getattr(self, f"mir_{each.name}") for each in fields(ProbeSource)})

    def options(self) -> dict[str, Any]:
        """The flags as keyword arguments of `attach_mir`, without those of the probe: the processor and all options.

        Raises:
            ConfigError: a flag has an invalid value.
        """
        found: dict[str, Any] = {}
        for each in fields(MIRConfig):
            value, flag = getattr(self, f"mir_{each.name}"), each.metadata["flag"]
            found[each.name] = None if "none" in flag and value == flag["none"] else value
        found["stop"] = self._stop()
        config = MIRConfig(**found)
        options = {each.name: getattr(config, each.name) for each in fields(MIRConfig)}
        return {"processor": getattr(self, "mir_processor"), **options}  # noqa: B009  # the field is made below

    def _stop(self) -> PlateauRule | None:
        asked = getattr(self, "mir_stop")  # noqa: B009  # the field is made below
        if asked not in STOP_RULES:
            raise ConfigError(f"mir_stop must be one of {', '.join(STOP_RULES)}, got {asked!r}")
        values = {each.name: getattr(self, f"mir_stop_{each.name}") for each in _rule_fields()}
        rule = PlateauRule(**{**values, "horizon": values["horizon"] or None}, observe_only=asked == "observe")
        return None if asked == "none" else rule


def _rule_fields() -> list[dataclasses.Field[Any]]:
    return [each for each in fields(PlateauRule) if each.name != "observe_only"]


def _flag(each: dataclasses.Field[Any], prefix: str) -> tuple[str, Any, Any]:
    """The field of :class:`MIRArguments` for an option: name, type, field."""
    how = each.metadata.get("flag", {})
    hints = {"str": str, "int": int, "float": float, "bool": bool}
    words = str(each.type).partition(" |")[0]
    kind = how.get("type", hints.get(words, str))
    default = how.get("default", each.default)
    if default is None and "none" in how:
        default = how["none"]
    made = field(default=default, metadata={"help": each.metadata["help"].replace("%", "%%")})
    return f"{prefix}{each.name}", kind if default is not None else kind | None, made


def _flag_group(title: str, *flags: tuple[str, Any, Any]) -> Any:
    """A dataclass of flags that :class:`transformers.HfArgumentParser` shows under a title."""
    made = dataclasses.make_dataclass("FlagGroup", flags)
    made._argument_group_name = title  # type: ignore[attr-defined]
    return made


_PROCESSOR_FLAG = (
    "mir_processor",
    str | None,
    field(
        default=None,
        metadata={"help": "folder or name of the model's processor (default: the Trainer's or the model's)"},
    ),
)
# The fields of MIRArguments in groups, which `--help` of the launcher shows under their titles.
FLAG_GROUPS: list[Any] = [
    _flag_group("the probe", *(_flag(each, "mir_") for each in fields(ProbeSource)), _PROCESSOR_FLAG),
    *(
        _flag_group(
            title,
            *(_flag(each, "mir_") for each in fields(MIRConfig) if each.metadata["group"] == group),
            *(_flag(each, "mir_stop_") for each in _rule_fields() if group == "stop"),
        )
        for group, title in GROUPS.items()
    ),
]
MIRArguments = dataclasses.make_dataclass(
    "MIRArguments",
    [],
    bases=(_Arguments, *reversed(FLAG_GROUPS)),  # dataclasses take fields from the last base first
    namespace={
        "__doc__": """Every option as a flag `--mir_NAME`, for `HfArgumentParser` beside a script's own dataclasses.

    Raises:
        ConfigError: a flag has an invalid value, or flags contradict each other.

    Ranks: any; reads no files before ``probe_source().load()``.

    Example:
        >>> from transformers import HfArgumentParser
        >>> words = ["--mir_probe", "probe.zip", "--mir_every", "0.1ep"]
        >>> (arguments,) = HfArgumentParser(MIRArguments).parse_args_into_dataclasses(words)
        >>> arguments.enabled, arguments.options()["every"]
        (True, EveryEpochs(epochs=0.1))

        Before training: ``attach_mir(trainer, arguments.probe_source().load(), **arguments.options())``.
    """,
        "_argument_group_name": "MIR",
    },
)
MIRArguments.__module__ = __name__


def _stop_rule(stop: Any) -> Any:
    """The stop rule for a value of ``stop``."""
    if isinstance(stop, str):
        if stop not in STOP_RULES:
            raise ConfigError(f"stop must be a stop rule, None or one of {', '.join(STOP_RULES)}, got {stop!r}")
        return None if stop == "none" else PlateauRule(observe_only=stop == "observe")
    if stop is not None and (isinstance(stop, type) or not callable(getattr(stop, "verdict", None))):
        raise ConfigError(f"stop={stop!r} has no method verdict(records). Use e.g. PlateauRule(), or None.")
    return stop


def _check_count(name: str, value: Any, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} must be a positive integer ({unit}), got {value!r}")


def _check_positive(name: str, value: Any, unit: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"{name} must be a positive number ({unit}), got {value!r}")
