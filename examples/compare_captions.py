# SPDX-License-Identifier: Apache-2.0
"""Compare two data mixes for a first stage by MIR, short captions and long ones, as the MIR paper's Table 1 does.

    OMP_NUM_THREADS=1 .venv/bin/python examples/compare_captions.py

The demo's tiny LLaVA is pre-trained on the same pictures with either kind of caption, several seeds of each: a seed
alone moves MIR, by more than the choice of the probe's samples does, and only replicates show how far. Both mixes have
the same seeds, so `mir compare` pairs the runs and says which mix is lower, or that the noise forbids to say.

It runs on the CPU and downloads nothing. The backbones are those of `make demo`, trained once (two minutes) and cached.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tiny_llava.prepare import prepare
from tiny_llava.runtime import quieten
from tiny_llava.scenes import DIGIT_WORDS
from tiny_llava.short import COLUMNS, REHEARSAL, Size, columns_of, compare, course_of, make_trainer


def short_caption(digits: Sequence[int]) -> str:
    """What is in the picture, in a few words."""
    return "The digits {}, {}, {}, {}.".format(*(DIGIT_WORDS[digit] for digit in digits))


def long_caption(digits: Sequence[int]) -> str:
    """Where everything is, in sentences."""
    return (
        "The upper row reads {0}, {1} and the lower row reads {2}, {3}. "
        "The digits {0} and {1} stand above {2} and {3}. "
        "Four digits: {0} and {2} on the left, {1} and {3} on the right."
    ).format(*(DIGIT_WORDS[digit] for digit in digits))


MIXES = {"short": short_caption, "long": long_caption}


def main() -> None:
    """Train every mix with every seed, then compare."""
    options = parse_options()
    quieten()
    size = REHEARSAL if options.rehearse else Size(steps=400, every=25)
    start = prepare(options.cache, size.backbones)
    lines = ["", f"{'captions':<8}  {'seed':>4}  {COLUMNS}"]
    for seed in range(1, options.seeds + 1):
        for name, caption in MIXES.items():
            folder = options.output / name / f"seed_{seed}"
            make_trainer(start, size, folder, caption=caption, name=f"{name} captions", seed=seed).train()
            lines.append(f"{name:<8}  {seed:>4}  {columns_of(course_of(folder))}")
    print("\n".join(lines))
    compare(*(f"{name}={options.output / name}/seed_*" for name in MIXES))


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Compare short and long captions by MIR.")
    parser.add_argument("--output", type=Path, default=Path("runs/captions"), help="folder of the runs")
    parser.add_argument("--cache", type=Path, default=Path("runs/demo_cache"), help="folder of the trained backbones")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each mix")
    parser.add_argument("--rehearse", action="store_true", help="a few steps only; the values mean nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
