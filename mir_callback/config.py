# SPDX-License-Identifier: Apache-2.0
"""MIR's options as command-line flags, for `HfArgumentParser` beside a script's own dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mir_callback.early_stopping import PlateauRule
from mir_callback.errors import ConfigError
from mir_callback.evaluation.memory import check_capture_budget
from mir_callback.failures import FailurePolicy
from mir_callback.metric.frechet import check_root
from mir_callback.pending import check_solve
from mir_callback.probe.batches import check_batch_size
from mir_callback.probe.probe import check_draw
from mir_callback.schedule import (
    DEFAULT_EVENTS,
    AtSteps,
    EveryEpochs,
    EverySteps,
    LogSpaced,
    Schedule,
    TimeShare,
    check_events,
)
from mir_callback.watchdog import DEFAULT_SECONDS, Watchdog

STOP_RULES = ("none", "observe", "plateau")
_FORMS = "50 (steps), 0.1ep (epochs), log5 (per decade), 5% (of the time) or 10,100,1000 (these steps)"


@dataclass
class MIRArguments:
    """What a training script lets its user say about MIR.

    Raises:
        ConfigError: a flag breaks its rule, one of --mir_images and --mir_texts is given without the other, or both
            and --mir_probe.
    """

    mir_images: str | None = field(default=None, metadata={"help": "Folder of probe images; switches MIR on."})
    mir_texts: str | None = field(default=None, metadata={"help": "Folder of probe texts (.txt, .md, .story)."})
    mir_probe: str | None = field(
        default=None, metadata={"help": "A saved probe (see `mir probe`) instead of the two folders."}
    )
    mir_num_samples: int | None = field(
        default=None, metadata={"help": "Image + text pairs to draw from the folders (default: 100)."}
    )
    mir_seed: int | None = field(default=None, metadata={"help": "Seed of the draw (default: 0)."})
    mir_every: str = field(
        default="50",
        metadata={
            "help": "When to evaluate: 50 (every 50 optimizer steps), 0.1ep (of an epoch), log5 (5 from each power of "
            "ten to the next), 5%% (at most, of the time) or 10,100,1000 (these steps)."
        },
    )
    mir_also_on: str = field(
        default=",".join(DEFAULT_EVENTS),
        metadata={"help": "All events at which to evaluate besides: some of start,end,evaluate,save, or none."},
    )
    mir_dry_run: bool = field(
        default=False, metadata={"help": "Evaluate once before the first step, say what it costs, and end."}
    )
    mir_batch_size: int = field(default=4, metadata={"help": "Probe samples per forward on each rank."})
    mir_root: str = field(default="exact", metadata={"help": "exact, or paper_fast to compare with published values."})
    mir_standard_error: bool = field(
        default=True, metadata={"help": "Also find how far MIR would vary with other samples like the probe's."}
    )
    mir_bias_gauge: bool = field(
        default=False, metadata={"help": "Also find MIR with most of the bias of a finite probe removed."}
    )
    mir_probe_loss: bool = field(
        default=False, metadata={"help": "Also find how well the model predicts the probe's texts."}
    )
    mir_solve: str = field(
        default="now",
        metadata={"help": "now, or background: train on while the solves run, values come some steps later."},
    )
    mir_capture_budget_gb: float | None = field(
        default=None,
        metadata={"help": "GB of token rows to keep on each rank's device (default: half of what is free)."},
    )
    mir_save_probe: bool = field(default=True, metadata={"help": "Keep the probe as OUTPUT_DIR/mir_probe.zip."})
    mir_keep_best: bool = field(
        default=False, metadata={"help": "Keep the weights with the lowest MIR in OUTPUT_DIR/mir_best."}
    )
    mir_stop: str = field(
        default="none",
        metadata={"help": "none: watch only; plateau: stop when MIR is level; observe: say when it would."},
    )
    mir_stop_window: int = field(default=7, metadata={"help": "Fewest evaluations the plateau rule fits its line to."})
    mir_stop_min_delta: float = field(
        default=0.02, metadata={"help": "Fall of MIR within the horizon that is still worth going on for."}
    )
    mir_stop_warmup: int = field(default=5, metadata={"help": "First evaluations the line is never fitted to."})
    mir_stop_horizon: float = field(
        default=0.1,
        metadata={"help": "How far ahead to look: a part of the run, or a number of steps; 0 for the window's length."},
    )
    mir_stop_patience: int = field(default=1, metadata={"help": "Evaluations in a row that must find the plateau."})
    mir_stop_patience_steps: int = field(
        default=0, metadata={"help": "Steps for which evaluations must have found the plateau."}
    )
    mir_stop_log_steps: bool = field(
        default=False, metadata={"help": "Fit the line against the logarithm of the step."}
    )
    mir_continue_after_stop: bool = field(
        default=False, metadata={"help": "Go on with a resumed run that was stopped on its plateau."}
    )
    mir_on_error: str = field(
        default="warn",
        metadata={"help": "warn: only a failing first evaluation ends the run; raise: every failing one does."},
    )
    mir_max_failures: int = field(
        default=3, metadata={"help": "Failed evaluations in a row after which there are no more; 0 for no limit."}
    )
    mir_watchdog_seconds: float = field(
        default=DEFAULT_SECONDS,
        metadata={"help": "Report where ranks are stuck when a phase of an evaluation lasts longer; 0 for never."},
    )
    mir_abort_on_hang: bool = field(
        default=False, metadata={"help": "End the process, with exit code 86, after such a report."}
    )

    def __post_init__(self) -> None:
        """Check what can be checked without reading anything."""
        for given, missing in (("mir_images", "mir_texts"), ("mir_texts", "mir_images")):
            if getattr(self, given) is not None and getattr(self, missing) is None:
                raise ConfigError(f"{missing} must be given with {given}, got {given}={getattr(self, given)!r} alone")
        if self.mir_probe is not None and self.mir_images is not None:
            raise ConfigError(
                f"mir_probe must be given without mir_images and mir_texts, got {self.mir_probe!r} and "
                f"{self.mir_images!r}; a saved probe has its images and texts"
            )
        if self.mir_stop not in STOP_RULES:
            raise ConfigError(f"mir_stop must be one of {', '.join(STOP_RULES)}, got {self.mir_stop!r}")
        check_draw(1 if self.mir_num_samples is None else self.mir_num_samples, self.mir_seed or 0)
        check_batch_size(self.mir_batch_size)
        parse_schedule(self.mir_every)
        self.events()
        check_root(self.mir_root)
        check_solve(self.mir_solve, keep_best=self.mir_keep_best)
        check_capture_budget(self.mir_capture_budget_gb)
        self.stop_rule()
        FailurePolicy(self.mir_on_error, self.mir_max_failures or None)
        Watchdog(self.mir_watchdog_seconds or None, self.mir_abort_on_hang)

    @property
    def enabled(self) -> bool:
        """Whether MIR is to be watched."""
        return self.mir_images is not None or self.mir_probe is not None

    def events(self) -> tuple[str, ...]:
        """The events that the flag names."""
        words = [word.strip() for word in self.mir_also_on.split(",") if word.strip()]
        return check_events([] if words == ["none"] else words)

    def stop_rule(self) -> PlateauRule | None:
        """The rule that the flags describe, or None."""
        rule = PlateauRule(
            self.mir_stop_window,
            self.mir_stop_min_delta,
            self.mir_stop_warmup,
            horizon=self.mir_stop_horizon or None,
            patience=self.mir_stop_patience,
            patience_steps=self.mir_stop_patience_steps,
            log_steps=self.mir_stop_log_steps,
            observe_only=self.mir_stop == "observe",
        )
        return None if self.mir_stop == "none" else rule

    def attach_options(self) -> dict[str, Any]:
        """Keyword arguments of `llava_integration.attach_mir`."""
        return {
            "images": self.mir_images,
            "texts": self.mir_texts,
            "probe": self.mir_probe,
            "num_samples": self.mir_num_samples,
            "seed": self.mir_seed,
            "every": parse_schedule(self.mir_every),
            "also_on": self.events(),
            "dry_run": self.mir_dry_run,
            "batch_size": self.mir_batch_size,
            "root": self.mir_root,
            "standard_error": self.mir_standard_error,
            "bias_gauge": self.mir_bias_gauge,
            "probe_loss": self.mir_probe_loss,
            "solve": self.mir_solve,
            "capture_budget_gb": self.mir_capture_budget_gb,
            "stop": self.stop_rule(),
            "on_error": self.mir_on_error,
            "max_failures": self.mir_max_failures or None,
            "watchdog_seconds": self.mir_watchdog_seconds or None,
            "abort_on_hang": self.mir_abort_on_hang,
            "save_probe": self.mir_save_probe,
            "keep_best": self.mir_keep_best,
            "continue_after_stop": self.mir_continue_after_stop,
        }


def parse_schedule(text: str) -> int | Schedule:
    """A schedule as written on a command line.

    Raises:
        ConfigError: of no known form, or a number breaks its rule.
    """
    words = str(text).strip().lower()
    try:
        if words.endswith("ep"):
            return EveryEpochs(float(words[:-2]))
        if words.endswith("%"):
            return TimeShare(float(words[:-1]) / 100)
        if words.startswith("log"):
            return LogSpaced(int(words[3:]))
        if "," in words:
            return AtSteps(tuple(int(word) for word in words.split(",") if word.strip()))
        return EverySteps(int(words)).steps
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"mir_every must be one of {_FORMS}, got {text!r}") from error
