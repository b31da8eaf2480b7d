# SPDX-License-Identifier: Apache-2.0
"""Choose the learning rate of a first stage by vision gain, and see what MIR would have chosen.

    OMP_NUM_THREADS=1 .venv/bin/python examples/choose_learning_rate.py

Each rate pre-trains the demo's tiny LLaVA for a short run; Optuna, through the Trainer's own search, takes the rate
with the highest vision gain at the end of its run: another image would cost the captions of unseen scenes most. No
fine-tuning is needed. A run that is half-way through is given up if its vision gain is below the median of the runs
before it. MIR, by which the MIR paper's Table 2 chooses, is shown beside it: a high rate makes vision tokens long,
which MIR counts against it, and docs/evidence.md shows how often that misleads.

It needs optuna (`pip install -e .[demo,optuna]`), runs on the CPU and downloads nothing. The backbones are those of
`make demo`, trained once (two minutes) and cached.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import optuna
from tiny_llava.prepare import prepare
from tiny_llava.runtime import quieten
from tiny_llava.short import COLUMNS, REHEARSAL, Size, columns_of, compare, course_of, make_trainer

from mir_callback import hyperparameter_search

RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def main() -> None:
    """Search, then show what was found."""
    options = parse_options()
    quieten()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    size = REHEARSAL if options.rehearse else Size()
    trainer = make_trainer(prepare(options.cache, size.backbones), size, options.output, captions=True)
    storage = optuna.storages.InMemoryStorage()
    best = hyperparameter_search(
        trainer,
        objective="vision_gain",
        backend="optuna",
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", RATES)},
        hp_name=folder_of,
        n_trials=len(RATES),
        # The seed is of the order, in which the lower rates come first here.
        sampler=optuna.samplers.GridSampler({"learning_rate": RATES}, seed=4),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=size.steps // 2),
        storage=storage,
        study_name="learning rate",
    )
    study = optuna.load_study(study_name="learning rate", storage=storage)
    print("\n".join(table(study)))
    print(f"Chosen: {best.hyperparameters['learning_rate']:g}, vision gain {best.objective:.3f}")
    finished = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    compare(*(str(options.output / folder_of(trial)) for trial in sorted(finished, key=rate_of)))


def folder_of(trial: optuna.trial.BaseTrial) -> str:
    """Where a trial's run goes, in the output folder."""
    return f"rate_{rate_of(trial):g}"


def rate_of(trial: optuna.trial.BaseTrial) -> float:
    """Its learning rate."""
    return float(trial.params["learning_rate"])


def table(study: optuna.Study) -> list[str]:
    """A line for each rate: MIR at the start, peak and end, the end's other values, and whether it was given up."""
    lines = ["", f"{'learning rate':>13}  {COLUMNS}  {'gain':>5}  {'loss':>5}  {'step':>4}"]
    for trial in sorted(study.trials, key=rate_of):
        course = course_of(Path(trial.user_attrs["mir_folder"]))
        ended = "  given up" if trial.state == optuna.trial.TrialState.PRUNED else ""
        last = f"{course.end.vision_gain:>5.2f}  {course.end.loss:>5.3f}  {course.end.step:>4}"
        lines.append(f"{rate_of(trial):>13g}  {columns_of(course)}  {last}{ended}")
    return lines


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Choose a learning rate by MIR.")
    parser.add_argument("--output", type=Path, default=Path("runs/learning_rate"), help="folder of the runs")
    parser.add_argument("--cache", type=Path, default=Path("runs/demo_cache"), help="folder of the trained backbones")
    parser.add_argument("--rehearse", action="store_true", help="a few steps only; the values mean nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
