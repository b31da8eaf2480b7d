# SPDX-License-Identifier: Apache-2.0
"""Run the study: train, measure and tune every run that is not done yet, then collect decisions.json.

    .venv/bin/python -m studies.decisions.study [--processes 2] [--folder runs/decisions]

It goes on where it was interrupted; a run that fails is reported at the end, and the others go on. Results are kept by
recipe and seed: delete the folder after a change of the code.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

from . import stages
from .evidence import RAW
from .measure import FIELDS, Measure
from .recipes import BY_NAME, FIXED_SEED, RECIPES, SEEDS, Recipe
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


def run(name: str, seed: int, folder: Path) -> None:
    """One run, as far as it is not done."""
    recipe, own = BY_NAME[name], run_folder(folder, name, seed)
    key, weights = key_of(recipe, seed), own / "weights"
    _keep(own / "train.json", key, lambda: {"losses": stages.train(_WORLD, recipe, seed, weights)})

    def tune(step: int) -> dict[str, Any]:
        model = _WORLD.model(recipe, seed)
        stages.restore(model, weights / f"{step:05d}.pt")
        return {"accuracy": stages.tune_and_score(_WORLD, model, recipe, seed)}

    if recipe.scored:
        _keep(own / "tune.json", key, lambda: tune(recipe.steps))
    measured = _keep(own / "measure.json", key, lambda: _MEASURE(recipe, seed, weights))
    if recipe.scored and measured["stopped_at"] not in (None, recipe.steps):
        _keep(own / "tune_stopped.json", key, lambda: tune(measured["stopped_at"]))
    if recipe.scored and recipe.kind != "sabotage" and seed == FIXED_SEED:
        _keep(own / "tune_fixed.json", key, lambda: tune(stages.fixed_stop(recipe)))


def key_of(recipe: Recipe, seed: int) -> dict[str, Any]:
    """What the results of a run depend on."""
    key = {**asdict(recipe), "seed": seed}
    del key["kind"], key["scored"]  # which change nothing in a run
    return key


def run_folder(folder: Path, name: str, seed: int) -> Path:
    """Where a run keeps its weights and results."""
    return folder / f"{name.replace(' ', '_')}-{seed}"


def collect(folder: Path) -> list[dict[str, Any]]:
    """The raw values of all runs that are done, as decisions.json has them."""
    found = []
    for recipe in RECIPES:
        for seed in SEEDS:
            files = run_folder(folder, recipe.name, seed).glob("*.json")
            read = {file.stem: json.loads(file.read_text()) for file in files}
            results = {name: each for name, each in read.items() if each["key"] == key_of(recipe, seed)}
            if not {"train", "measure"} <= results.keys() or (recipe.scored and "tune" not in results):
                continue
            losses, measured = results["train"]["losses"], results["measure"]
            curve = [_brief(point) for point in measured["curve"]]
            end, tail = measured["curve"][-1], losses[-max(1, len(losses) // 10) :]
            values = {name: value for name, value in end.items() if name not in ("step", "captions")}
            on_captions = {f"captions_{name}": value for name, value in end["captions"].items()}
            found.append(
                {
                    "recipe": recipe.name,
                    "kind": recipe.kind,
                    "captions": recipe.captions,
                    "seed": seed,
                    "steps": recipe.steps,
                    "stage1": {**values, **on_captions, **measured["candidates"], "loss": sum(tail) / len(tail)},
                    "accuracy": results.get("tune", {}).get("accuracy"),
                    "stopped_at": measured["stopped_at"],
                    "stopped_accuracy": results.get("tune_stopped", {}).get("accuracy"),
                    "fixed_accuracy": results.get("tune_fixed", {}).get("accuracy"),
                    "curve": curve,
                }
            )
    return found


def _brief(point: dict[str, Any]) -> dict[str, Any]:
    """A point of a curve without the companions of layers, which only the end keeps."""
    found = {name: point[name] for name in ("step", *FIELDS) if name in point}
    return found | ({"captions": _brief(point["captions"])} if "captions" in point else {})


def main() -> None:
    """Read the command line, run what is missing, collect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/decisions"), help="results of single runs, and weights"
    )
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a core each")
    options = parser.parse_args()
    world = World(options.folder / "cache")  # made once, before the workers start
    for kind in {recipe.tower for recipe in RECIPES}:
        world.tower(kind)
    spawn = multiprocessing.get_context("spawn")
    failed = []
    with ProcessPoolExecutor(options.processes, spawn, _set_up, (options.folder,)) as pool:
        jobs = {
            pool.submit(run, recipe.name, seed, options.folder): f"{recipe.name}, seed {seed}"
            for seed, recipe in sorted(product(SEEDS, RECIPES), key=lambda pair: not pair[1].scored)
        }
        for job in tqdm(as_completed(jobs), total=len(jobs), unit="run"):
            if job.exception():
                failed.append(f"{jobs[job]}: {job.exception()!r}")
    found = collect(options.folder)
    RAW.write_text("[\n" + ",\n".join(json.dumps(each) for each in found) + "\n]\n")
    print(f"{len(found)} of {len(jobs)} runs are in {RAW}")
    if failed:
        sys.exit("These runs failed, the others are done:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
