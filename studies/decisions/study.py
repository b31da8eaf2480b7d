# SPDX-License-Identifier: Apache-2.0
"""Run the study: train, measure and tune every run that is not done yet, then collect decisions.json.

    .venv/bin/python -m studies.decisions.study [--processes 2] [--folder runs/decisions]

It goes on where it was interrupted; a run that fails is reported at the end, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from . import stages
from .recipes import BY_NAME, RECIPES, SEEDS
from .measure import Measure
from .world import World

_WORLD: World
_MEASURE: Measure


def _set_up(folder: Path) -> None:
    global _WORLD, _MEASURE
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    _WORLD = World(folder / "cache")
    _MEASURE = Measure(_WORLD)


def _keep(file: Path, key: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The contents of a result file; made first if there is none yet for the same key."""
    if file.exists():
        found = json.loads(file.read_text())
        if found.pop("key") == key:
            return found
    made = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"key": key, **made}))
    part.rename(file)
    return made


def run(name: str, seed: int, folder: Path, what: str) -> float:
    """One run, as far as it is not done; returns the seconds it took."""
    started, recipe, own = time.perf_counter(), BY_NAME[name], folder / f"{name.replace(' ', '_')}-{seed}"
    key, weights = {**asdict(recipe), "seed": seed}, own / "weights"
    _keep(own / "train.json", key, lambda: {"losses": stages.train(_WORLD, recipe, seed, weights)})

    def tune(step: int) -> dict[str, Any]:
        model = _WORLD.model(recipe, seed)
        stages.restore(model, weights / f"{step:05d}.pt")
        return {"accuracy": stages.tune_and_score(_WORLD, model, recipe, seed), "step": step}

    if recipe.scored:
        _keep(own / "tune.json", key, lambda: tune(recipe.steps))
    measured = _keep(own / "measure.json", key, lambda: _MEASURE(recipe, seed, weights))
    if recipe.scored and measured["stopped_at"] is not None:
        _keep(own / "tune_stopped.json", key, lambda: tune(measured["stopped_at"]))
    return time.perf_counter() - started


def main() -> None:
    """Read the command line, run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path("runs/decisions"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--what", default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options = parser.parse_args()
    World(options.folder / "cache")  # made once, before the workers start
    spawn = multiprocessing.get_context("spawn")
    failed = []
    with ProcessPoolExecutor(options.processes, spawn, _set_up, (options.folder,)) as pool:
        jobs = {
            pool.submit(run, recipe.name, seed, options.folder, options.what): f"{recipe.name}-{seed}"
            for seed in options.seeds
            for recipe in RECIPES
        }
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="run"):
            if job.exception():
                failed.append(f"{jobs[job]}: {job.exception()!r}")
    if failed:
        sys.exit("These runs failed, the others are done:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
