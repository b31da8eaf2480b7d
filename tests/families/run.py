# SPDX-License-Identifier: Apache-2.0
"""A table of the families: `python -m tests.families.run [NAME ...]`."""

from __future__ import annotations

import sys
import time
import traceback

from tests.families.torchvision_ops import load_torchvision

load_torchvision()

from mir_callback import Probe, evaluate_mir  # noqa: E402
from mir_callback.errors import MIRError  # noqa: E402
from tests.families.reference import mir_of  # noqa: E402
from tests.families.registry import Family, families  # noqa: E402
from tests.samples import pairs  # noqa: E402


def result(family: Family, *, loud: bool) -> str:
    """What an evaluation of the family gives, in a line."""
    model, processor = family.build()
    try:
        report = evaluate_mir(model, Probe.from_pairs(pairs(4)), processor=processor, batch_size=2)
    except MIRError as error:
        right = bool(family.refused) and family.refused in str(error)
        return f"{'refused as expected' if right else 'REFUSED'}: {error}"
    except Exception as error:
        if loud:
            traceback.print_exc()
        return f"CRASH {type(error).__name__}: {str(error)[:200]}"
    if family.refused:
        return f"NOT REFUSED, {report.mir:.6f}"
    # Of a fresh one: transformers' own capture counts layers twice in a model whose parts have captured before.
    expected = mir_of(family, *family.build(), pairs(4))
    word = "right" if abs(expected - report.mir) < 1e-5 else "WRONG"
    return f"{word} {report.mir:.6f}, reference {expected:.6f}"


def main(names: list[str]) -> None:
    for family in families():
        if names and not any(name in family.name for name in names):
            continue
        started = time.perf_counter()
        try:
            line = result(family, loud=bool(names))
        except Exception as error:
            if names:
                traceback.print_exc()
            line = f"NOT BUILT {type(error).__name__}: {str(error)[:200]}"
        print(f"{family.name:28} {time.perf_counter() - started:5.1f} s  {line}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
