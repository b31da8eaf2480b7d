# SPDX-License-Identifier: Apache-2.0
"""Does vision gain agree with MIR? A pure rule over the records of a run.

MIR falls when vision tokens come closer to text tokens, and also when they only become shorter. Vision gain says whether
the texts need their images. Where the two disagree, MIR misleads, and a record says so. How often the rule is wrong:
docs/evidence.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mir_callback.record import EvalRecord

# Vision counts as unused while another image costs the texts less than this, in nats per token, or than two errors.
_UNUSED, _ERRORS = 0.02, 2.0
# A fall of MIR that vision gain has to follow, and the part of it by which it has to rise then.
_FALL, _RISE = 0.25, 0.03
# Part of the planned steps before which vision need not be used yet.
_EARLIEST = 0.5
# A fall of MIR of which scale-free MIR shares less than this part is one of norms.
_SHARED = 0.1


@dataclass(frozen=True)
class Contradiction:
    """Why MIR misleads.

    Attributes:
        kind: "unused": the texts don't need their images. "not more": MIR fell, and they don't need them more.
        message: a sentence with the figures.
    """

    kind: Literal["unused", "not more"]
    message: str


def find_contradiction(records: Sequence[EvalRecord]) -> Contradiction | None:
    """What vision gain says against MIR at the last record; None if nothing, or if the record has no vision gain.

    Args:
        records: the evaluations of one run so far. Those of other training stages and failed ones don't count.

    Ranks: pure.

    Example:
        >>> records = [EvalRecord(step=step, mir=mir, vision_gain=1.8) for step, mir in ((100, 2.5), (200, 1.6))]
        >>> find_contradiction(records).message
        'MIR fell by 0.90 since step 100, but vision is not used more: vision gain 1.800, then 1.800'
    """
    if not records:
        return None
    now, mir, gain = records[-1], records[-1].mir, records[-1].vision_gain
    if mir is None or gain is None:
        return None
    falls = [
        (old.mir - mir, old)
        for old in records[:-1]
        if old.stage == now.stage and old.mir is not None and old.vision_gain is not None and old.mir - mir >= _FALL
    ]
    is_late = now.step > 0 and now.step >= _EARLIEST * (now.max_steps or 0)
    if is_late and gain <= max(_UNUSED, _ERRORS * (now.vision_gain_se or 0.0)):
        fell = f"MIR fell by {falls[0][0]:.2f} since step {falls[0][1].step}, but " if falls else ""
        return Contradiction("unused", f"{fell}vision is not used: vision gain {gain:.3f}{_by_norms(falls, now)}")
    level = [(fall, old) for fall, old in falls if gain - old.vision_gain <= _RISE * max(gain, old.vision_gain)]
    if not level:
        return None
    fall, old = max(level, key=lambda pair: pair[0])
    return Contradiction(
        "not more",
        f"MIR fell by {fall:.2f} since step {old.step}, but vision is not used more: vision gain "
        f"{old.vision_gain:.3f}, then {gain:.3f}{_by_norms([(fall, old)], now)}",
    )


def _by_norms(falls: Sequence[tuple[float, EvalRecord]], now: EvalRecord) -> str:
    """What scale-free MIR says of a fall of MIR, if it says that only norms fell."""
    for fall, old in falls[:1]:
        if old.scale_free_mir is not None and now.scale_free_mir is not None:
            shared = old.scale_free_mir - now.scale_free_mir
            if shared < _SHARED * fall:
                return f", and scale-free MIR fell by {shared:.3f} only: vision tokens have become shorter"
    return ""
