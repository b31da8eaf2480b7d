# SPDX-License-Identifier: Apache-2.0
"""One run of a wandb sweep: the demo's tiny LLaVA, with what the sweep's agent puts on the command line.

    wandb sweep examples/sweeps/wandb_sweep.yaml      # prints the sweep's id; needs an account or a server of your own
    wandb agent ENTITY/PROJECT/ID

By itself, into a local (offline) wandb run:

    WANDB_MODE=offline python examples/sweeps/train.py --learning_rate 1e-3 --captions short

Any script that trains with a MIRCallback and `report_to="wandb"` serves a sweep as this one does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import wandb

sys.path.insert(0, str(Path(__file__).parents[1]))
from compare_captions import MIXES
from tiny_llava.prepare import prepare
from tiny_llava.runtime import quieten
from tiny_llava.short import REHEARSAL, Size, make_trainer


def main() -> None:
    """Train once; the agent has named the run, which wandb opens."""
    options = parse_options()
    quieten()
    size = REHEARSAL if options.rehearse else Size()
    start = prepare(options.cache, size.backbones)
    with wandb.init() as run:
        folder = options.output / run.id
        caption = MIXES[options.captions]
        rate = options.learning_rate
        make_trainer(start, size, folder, learning_rate=rate, caption=caption, report_to=["wandb"]).train()


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="One run of a wandb sweep by MIR.")
    parser.add_argument("--learning_rate", type=float, required=True)
    parser.add_argument("--captions", choices=MIXES, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/wandb_sweep"), help="folder of the runs")
    parser.add_argument("--cache", type=Path, default=Path("runs/demo_cache"), help="folder of the trained backbones")
    parser.add_argument("--rehearse", action="store_true", help="a few steps only; the values mean nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
