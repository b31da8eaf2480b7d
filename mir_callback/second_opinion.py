# SPDX-License-Identifier: Apache-2.0
"""Does vision gain agree with MIR? A pure rule over the records of a run.

MIR falls when vision tokens come closer to text tokens, and also when they only become shorter. Vision gain says if
texts need their images. Where the two disagree MIR misleads, and the record says so. How often the rule is right:
docs/evidence.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mir_callback.record import EvalRecord

# Vision counts as unused while another image costs the texts less than this, in nats per token, or than two errors.
_UNUSED, _ERRORS = 0.02, 2.0
# Before this part of the planned steps it need not be used yet. Without a plan nobody knows.
_EARLIEST = 0.5
# A fall of MIR that vision gain has to follow, and the part of itself by which it has to rise then, at least _UNUSED.
_FALL, _RISE = 0.25, 0.05
# Vision tokens have only become shorter where scale-free MIR shares less than this part of a fall.
_SHARED = 0.1


@dataclass(frozen=True)
class Contradiction:
    """Why MIR misleads.

    Attributes:
        kind: "unused": texts don't need their images. "not more": MIR fell, and they don't need them more.
        message: a sentence with the figures.
    """

    kind: Literal["unused", "not more"]
    message: str


def find_contradiction(records: Sequence[EvalRecord]) -> Contradiction | None:
    """What vision gain says against MIR at the last record; None if nothing, or if that has no vision gain.

    Args:
        records: the evaluations of one run so far. Those of other training stages and failed ones don't count.

    Ranks: pure.

    Example:
        >>> records = [EvalRecord(step=step, mir=mir, vision_gain=1.8) for step, mir in ((100, 2.5), (200, 1.6))]
        >>> find_contradiction(records).message
        'MIR fell by 0.90 since step 100, but vision is not used more: vision gain 1.800, then 1.800'
    """
    now = records[-1] if records else EvalRecord(step=0)
    mir, gain = now.mir, now.vision_gain
    if mir is None or gain is None:
        return None
    falls = [
        (old.mir - mir, old.vision_gain, old)
        for old in records[:-1]
        if old.stage == now.stage and old.mir is not None and old.vision_gain is not None and old.mir - mir >= _FALL
    ]
    error = now.vision_gain_se
    is_late = now.max_steps is not None and now.step >= _EARLIEST * now.max_steps
    if is_late and gain <= max(_UNUSED, _ERRORS * (error or 0.0)):
        figures = f"{gain:.3f}" + ("" if error is None else f" +- {error:.3f}")
        return Contradiction("unused", f"vision is not used: another image costs the texts {figures} nats per token")
    level = [each for each in falls if gain - each[1] <= max(_UNUSED, _RISE * max(gain, each[1]))]
    if not level:
        return None
    fall, before, old = max(level, key=lambda each: each[0])
    fell = f"MIR fell by {fall:.2f} since step {old.step}, but vision is not used more"
    gains = f"vision gain {before:.3f}, then {gain:.3f}"
    return Contradiction("not more", f"{fell}: {gains}{_by_norms(fall, old, now)}")


def _by_norms(fall: float, old: EvalRecord, now: EvalRecord) -> str:
    """What scale-free MIR adds if only norms fell."""
    if old.scale_free_mir is None or now.scale_free_mir is None:
        return ""
    shared = old.scale_free_mir - now.scale_free_mir
    if shared >= _SHARED * fall:
        return ""
    return f". Scale-free MIR went from {old.scale_free_mir:.3f} to {now.scale_free_mir:.3f}: vision tokens are shorter"
