# SPDX-License-Identifier: Apache-2.0
"""What `mir compare` and `mir report` take for many long histories: CPU time, memory, size of the page."""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mir_callback.cli import main as mir
from mir_callback.history import FILE_NAME, read_records
from mir_callback.record import EvalRecord, shorten

LAYERS, SAMPLES = 80, 100
COMPANIONS = ("mean_part", "covariance_part", "norm_ratio", "cosine", "vision_rank", "text_rank")


def write_run(path: Path, seed: int, evaluations: int) -> None:
    """A run whose MIR falls with noise, and whose records have every field that training with a stop rule writes."""
    rng = np.random.default_rng(seed)
    walk = 3.5 - 1.5 * np.arange(evaluations) / evaluations + np.cumsum(rng.normal(0, 0.002, evaluations))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for number, level in enumerate(walk.tolist()):
            distances = rng.lognormal(0, 1, LAYERS)
            distances *= 10**level / distances.sum()
            influences = rng.normal(0, 0.1, SAMPLES)
            fields = {
                **{"step": 10 * number, "mir": level, "mir_se": 0.01 + 0.001 * rng.random(), "root": "exact"},
                **{"epoch": number / 1000, "per_layer": distances.tolist(), "num_samples": SAMPLES},
                **{"per_layer_se": (0.05 * distances).tolist(), "influences": [float(f"{v:.6g}") for v in influences]},
                "companions": {name: rng.lognormal(0, 1, LAYERS).tolist() for name in COMPANIONS},
                **{f"{kind}_outliers": rng.integers(0, 200, LAYERS).tolist() for kind in ("vision", "text")},
                **{name: f"{name:.16}" for name in ("probe_fingerprint", "tokens_fingerprint", "pixels_fingerprint")},
                **{"dtype": "bfloat16", "world_size": 8, "batch_size": 4, "passes": 1, "storage_device": "device"},
                **{"num_vision_tokens": 57600, "num_text_tokens": 90000, "peak_memory_bytes": 42949672960},
                **{"seconds": 13 + rng.random(), "eval_seconds": 13.6 * number, "eval_cost": 13 + rng.random()},
                **{"train_seconds": 30.1 * number, "step_seconds": 3 + rng.random(), "elapsed": 43.7 * number},
                **{"loss": 2 + rng.random(), "loss_step": 10 * number, "samples_seen": 2560 * number},
                **{"tokens_seen": 2_000_000 * number, "max_steps": 10 * evaluations, "stage": "0123456789abcdef"},
                **{"time": 1.7e9 + 43.7 * number, "verdict": "going on", "would_stop": False},
                "reason": f"expected to fall by {rng.random():.4f} +- 0.0041 in the next tenth of the run",
                **{"expected_gain": rng.random(), "expected_gain_se": rng.random()},
            }
            file.write(EvalRecord(**shorten(fields)).to_line())


def main() -> None:
    """Write the runs, measure in this process, and print one line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("write", "read", "compare", "report"))
    parser.add_argument("folder", type=Path, help="of the runs, which `write` fills")
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--evaluations", type=int, default=5000)
    options = parser.parse_args()
    paths = [options.folder / f"run_{number}" / FILE_NAME for number in range(options.runs)]
    started, words, size = time.process_time(), [str(path.parent) for path in paths], ""
    if options.what == "write":
        for seed, path in enumerate(paths):
            write_run(path, seed, options.evaluations)
        with paths[0].open() as file:
            size = f"; {np.mean([len(line) for line in file]):.0f} bytes a line"
    elif options.what == "read":
        read_records(paths[0])
    elif options.what == "compare":
        mir(["compare", *words])
    else:
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "page.html"
            mir(["report", *words, "-o", str(page)])
            size = f"; page of {page.stat().st_size / 1e6:.1f} MB"
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{options.what}: {time.process_time() - started:.1f} s of CPU, {memory:.2f} GB{size}", file=sys.stderr)


if __name__ == "__main__":
    main()
