# SPDX-License-Identifier: Apache-2.0
"""Does vision gain agree with MIR? A pure rule over the records of a run.

MIR falls when vision tokens come closer to text tokens, and also when they only become shorter. Vision gain says whether
the texts need their images. Where the two disagree, MIR misleads, and a record says so. How often the rule is wrong:
docs/evidence.md.
"""

from __future__ import annotations

import math
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
    """What the last record contradicts, or None; also None if it has no vision gain.

    Args:
        records: the evaluations of one run so far. Those of other training stages and failed ones don't count.

    Ranks: pure.

    Example:
        >>> records = [EvalRecord(step=step, mir=mir, vision_gain=1.8) for step, mir in ((100, 2.5), (200, 1.6))]
        >>> find_contradiction(records).message
        'MIR fell by 0.90 since step 100, but vision is not used more: vision gain went from 1.800 to 1.800'
    """
    if not records or records[-1].mir is None or records[-1].vision_gain is None:
        return None
    now = records[-1]
    earlier = [r for r in records[:-1] if r.stage == now.stage and r.mir is not None and r.vision_gain is not None]
    least = max(_UNUSED, _ERRORS * (now.vision_gain_se or 0.0))
    half = not now.max_steps or now.step >= _EARLIEST * now.max_steps
    ...
