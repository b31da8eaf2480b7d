# SPDX-License-Identifier: Apache-2.0
"""The verdict on each evaluation: what the rule is given, what a record keeps of its answer."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from typing import Any

from torch import nn

from mir_callback import collectives
from mir_callback.errors import ConfigError
from mir_callback.training.history import Record, since_last_stop
from mir_callback.training.verdicts import Verdict


class Judge:
    """Asks a stop rule about every evaluation.

    Args:
        rule: with `verdict(history)`, or None to judge nothing; one whose `observe_only` is true never stops a run.

    Raises:
        ConfigError: not a rule.
    """

    def __init__(self, rule: Any) -> None:
        if rule is not None and (isinstance(rule, type) or not callable(getattr(rule, "verdict", None))):
            raise ConfigError(f"stop must be None or a rule with verdict(history), got {rule!r}; use PlateauRule()")
        self._rule = rule
        self._stages: dict[int, str] = {}  # by step, until its evaluation is concluded

    @property
    def may_stop(self) -> bool:
        """Whether there is a rule that may end training, and not one that only observes. Ranks: pure."""
        return self._rule is not None and not getattr(self._rule, "observe_only", False)

    def see(self, step: int, model: nn.Module) -> None:
        """Remember what is trained at a step that is going to be evaluated. Ranks: each for itself."""
        self._stages[step] = stage_of(model)

    def conclude(self, history: Sequence[Record], record: Record, max_steps: int) -> Verdict | None:
        """Judge an evaluation, and write into its record what was found and what later verdicts need.

        Args:
            history: the run's records before it.
            record: the evaluation; gets `stage`, `max_steps`, `verdict`, `reason`, `would_stop`, `expected_gain` and
                `expected_gain_se`.
            max_steps: planned length of the run.

        Returns:
            Rank 0's verdict; None without a rule. A rule that fails does not end training.

        Ranks: collective.
        """
        record["stage"] = self._stages.pop(record["step"], None)
        record["max_steps"] = max_steps if max_steps > 0 else None
        verdict = None if self._rule is None else self._ask(self._rule, [*since_last_stop(list(history)), record])
        record |= verdict_fields(verdict)
        return verdict

    def _ask(self, rule: Any, history: Sequence[Record]) -> Verdict:
        verdict = Verdict("no data", "another rank decides")
        if collectives.is_main():
            try:
                verdict = rule.verdict(history)
                if not isinstance(verdict, Verdict):
                    raise ConfigError(f"stop.verdict(history) must return a Verdict, got {verdict!r}")
            except Exception as error:
                warnings.warn(f"the stop rule failed, training goes on: {type(error).__name__}: {error}", stacklevel=2)
                verdict = Verdict("no data", f"the stop rule failed: {type(error).__name__}: {error}")
        return collectives.broadcast_object(verdict)


def verdict_fields(verdict: Verdict | None) -> Record:
    """What a record keeps of a verdict.

    `verdict` "plateau" in a history means a run that was stopped: one that is only observed goes on, and says in
    `would_stop` that it would not have. Ranks: pure.
    """
    if verdict is None:
        return {"verdict": None, "reason": None}
    watching = verdict.would_stop and not verdict.stop
    return {
        "verdict": "going on" if watching else verdict.kind,
        "reason": f"only observing, would stop: {verdict.reason}" if watching else verdict.reason,
        "would_stop": verdict.would_stop,
        "expected_gain": verdict.expected_gain,
        "expected_gain_se": verdict.expected_gain_se,
    }


def stage_of(model: nn.Module) -> str:
    """A fingerprint of which parameters are trained: it changes where a run begins to train others. Ranks: pure."""
    names = sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12]
