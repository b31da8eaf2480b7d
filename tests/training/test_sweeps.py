# SPDX-License-Identifier: Apache-2.0
"""Real searches over real trainings: what each trial writes, what Optuna is told, what it ends early."""

import json
import math

import optuna
import pytest
import wandb

from mir_callback import MIRCallback, Probe, hyperparameter_search
from mir_callback.errors import ConfigError
from mir_callback.history import read_history
from mir_callback.integrations.sweeps import objective_record
from mir_callback.record import EvalRecord
from tests.distributed.launch import run_ranks
from tests.logs import logged
from tests.samples import pairs
from tests.training import wandb_file
from tests.training.runs import make_trainer
from tests.training.sweep_worker import PruneLater, searching_trainer

RATES = (3e-3, 1e-5, 3e-1)


def space(trial):
    return {"learning_rate": trial.suggest_categorical("learning_rate", RATES)}


def search(trainer, objective="mir", *, trials=3, **options):
    """Search over RATES; the best run and the study."""
    storage = options.pop("storage", None) or optuna.storages.InMemoryStorage()
    best = hyperparameter_search(
        trainer,
        objective,
        backend="optuna",
        hp_space=space,
        n_trials=trials,
        sampler=optuna.samplers.GridSampler({"learning_rate": RATES}, seed=0),
        storage=storage,
        study_name="search",
        **options,
    )
    return best, optuna.load_study(study_name="search", storage=storage)


def records_of(folder, number):
    return read_history(folder / f"run-{number}" / "mir_history.jsonl")


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search without an evaluation data set, as in a first stage."""
    folder = tmp_path_factory.mktemp("search")
    trainer = searching_trainer(folder)
    MIRCallback(Probe.from_pairs(pairs(4)), every=1, keep_best=True).attach(trainer)
    before = list(trainer.callback_handler.callbacks)
    best, study = search(trainer)
    return folder, best, study, before == trainer.callback_handler.callbacks


def test_best_run_has_the_lowest_final_mir_when_all_trials_are_finished(searched):
    folder, best, study, _ = searched
    finals = {number: records_of(folder, number)[-1].mir for number in range(len(RATES))}
    assert {trial.number: trial.value for trial in study.trials} == finals
    assert len(set(finals.values())) == len(RATES)
    assert (int(best.run_id), best.objective) == min(finals.items(), key=lambda item: item[1])
    assert best.hyperparameters == study.best_trial.params


def test_each_trial_has_its_own_history_and_weights_when_one_callback_serves_all(searched):
    folder, _, study, same_callbacks = searched
    assert not list(folder.glob("mir_*"))
    assert same_callbacks
    starts = set()
    for trial in study.trials:
        records = records_of(folder, trial.number)
        assert [record.step for record in records] == [0, 1, 2]
        assert sorted(path.name for path in (folder / f"run-{trial.number}").glob("mir_history*")) == [
            "mir_history.jsonl"
        ]
        note = json.loads((folder / f"run-{trial.number}" / "mir_best" / "mir_best.json").read_text())
        assert note["mir"] == min(record.mir for record in records[1:])
        assert trial.intermediate_values == {record.step: record.mir for record in records[1:]}
        assert trial.user_attrs["mir_folder"] == str(folder / f"run-{trial.number}")
        assert trial.user_attrs["mir_se"] == records[-1].mir_se
        starts.add(records[0]["mir"])
    assert len(starts) == 1  # a new model each, from the same seed


def test_trial_equals_a_run_of_its_own_when_made_with_the_same_rate(searched, tmp_path):
    folder, _, study, _ = searched
    trial = study.trials[1]
    trainer = searching_trainer(tmp_path, learning_rate=trial.params["learning_rate"])
    alone = MIRCallback(Probe.from_pairs(pairs(4)), every=1).attach(trainer)
    trainer.train()
    assert [record.mir for record in alone.history] == [record.mir for record in records_of(folder, trial.number)]
    assert (tmp_path / "mir_history.jsonl").exists()  # and a run that is no trial stays where it was


def test_lowest_value_is_the_objective_when_asked_for(tmp_path):
    trainer = searching_trainer(tmp_path, steps=2)
    MIRCallback(Probe.from_pairs(pairs(2)), every=1).attach(trainer)
    _, study = search(trainer, "mir_best", trials=2)
    lows = [min(record.mir for record in records_of(tmp_path, n)[1:]) for n in range(2)]
    assert [trial.value for trial in study.trials] == lows
    assert lows != [records_of(tmp_path, n)[-1].mir for n in range(2)]


def test_the_highest_vision_gain_is_chosen_when_asked_for(tmp_path):
    trainer = searching_trainer(tmp_path, steps=2)
    MIRCallback(Probe.from_pairs(pairs(3), matched=True), every=2, vision_gain=True).attach(trainer)
    best, study = search(trainer, "vision_gain", trials=2)
    gains = [records_of(tmp_path, n)[-1].vision_gain for n in range(2)]
    assert [trial.value for trial in study.trials] == gains
    assert best.objective == max(gains)


def test_trial_ends_at_the_pruned_evaluation_when_the_pruner_says_so(tmp_path):
    trainer = searching_trainer(tmp_path, steps=8)
    MIRCallback(Probe.from_pairs(pairs(4)), every=1).attach(trainer)
    _, study = search(trainer, pruner=PruneLater(), trials=2)
    finished, pruned = study.trials
    assert finished.state == optuna.trial.TrialState.COMPLETE
    assert records_of(tmp_path, 0)[-1].step == 8
    assert pruned.state == optuna.trial.TrialState.PRUNED
    last = records_of(tmp_path, 1)[-1]
    assert last.step == 2
    assert pruned.value == last.mir


@pytest.mark.slow
@pytest.mark.parametrize("given", [{}, {"pruner": None}], ids=["left out", "None"])
def test_no_trial_is_pruned_when_no_pruner_is_given(tmp_path, given):
    # Optuna's own default would prune the worst half from the sixth trial on.
    trainer = searching_trainer(tmp_path, steps=1)
    MIRCallback(Probe.from_pairs(pairs(2)), every=1).attach(trainer)
    storage = optuna.storages.InMemoryStorage()
    options = {"storage": storage, "study_name": "search", "sampler": optuna.samplers.RandomSampler(seed=0), **given}
    ranges = lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-1, log=True)}  # noqa: E731
    hyperparameter_search(trainer, backend="optuna", hp_space=ranges, n_trials=7, **options)
    states = {trial.state for trial in optuna.load_study(study_name="search", storage=storage).trials}
    assert states == {optuna.trial.TrialState.COMPLETE}


def test_trainers_own_evaluation_reports_mir_when_there_is_one(tmp_path):
    trainer = searching_trainer(tmp_path, evaluated=2, eval_strategy="steps", eval_steps=2, steps=4)
    MIRCallback(Probe.from_pairs(pairs(4)), every=1).attach(trainer)
    _, study = search(trainer, trials=1)
    by_step = {record.step: record.mir for record in records_of(tmp_path, 0)}
    assert study.trials[0].intermediate_values == {step: by_step[step] for step in (2, 4)}
    assert study.trials[0].value == by_step[4]


def test_trial_fails_when_its_last_evaluation_has_failed(tmp_path):
    trainer = searching_trainer(tmp_path, steps=2)
    callback = MIRCallback(Probe.from_pairs(pairs(4)), every=1).attach(trainer)
    healthy = trainer.model_init

    def init():
        model = healthy()
        calls = {"forwards": 0}

        def spoil(module, inputs):
            if not module.training:
                calls["forwards"] += 1
                if calls["forwards"] > 4:  # two samples together and each alone, then all four
                    raise RuntimeError("broken on purpose")

        model.register_forward_pre_hook(spoil)
        return model

    trainer.model_init = init
    with logged("broken on purpose"), pytest.raises(ValueError, match="No trials"):
        search(trainer, trials=1)
    assert [record.mir is None for record in callback.history] == [False, True, True]


def test_study_is_refused_when_it_was_measured_with_another_probe(tmp_path):
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    for seed, folder in ((1, "first"), (2, "second")):
        trainer = searching_trainer(tmp_path / folder, steps=1)
        MIRCallback(Probe.from_pairs(pairs(4, seed=seed)), every=1).attach(trainer)
        if seed == 1:
            search(trainer, trials=1, storage=storage)
            continue
        with pytest.raises(ConfigError, match="trial 1 with .*probe_fingerprint.*trial 0 with "):
            search(trainer, trials=1, storage=storage, load_if_exists=True)


def test_each_trial_is_a_wandb_run_that_says_how_it_was_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    trainer = searching_trainer(tmp_path / "out", report_to=["wandb"], steps=1)
    callback = MIRCallback(Probe.from_pairs(pairs(4)), every=1).attach(trainer)
    try:
        _, study = search(trainer, trials=2, hp_name=lambda trial: f"rate-{trial.number}")
        wandb.finish()
    finally:
        wandb.teardown()
    runs = sorted(tmp_path.glob("wandb/offline-run-*"))
    assert len(runs) == 2
    for number, run in enumerate(runs):
        (tmp_path / f"{number}" / "wandb").mkdir(parents=True)
        run.rename(tmp_path / f"{number}" / "wandb" / run.name)
        assert wandb_file.settings(tmp_path / f"{number}")["mir"]["probe_fingerprint"] == (callback.probe.fingerprint)
        records = read_history(tmp_path / "out" / f"rate-{number}" / "mir_history.jsonl")
        assert wandb_file.summary(tmp_path / f"{number}")["mir_best"] == records[-1].mir
        assert study.trials[number].value == records[-1].mir


@pytest.mark.parametrize("pruned", ["pruned", pytest.param("finished", marks=pytest.mark.slow)])
def test_all_ranks_train_the_same_trials_when_there_are_several(tmp_path, pruned):
    first, second = run_ranks("tests.training.sweep_worker", tmp_path, pruned)
    assert first["histories"] == second["histories"]
    steps = [[record[0] for record in trial] for trial in first["histories"]]
    assert steps == [[0, 1, 2, 3, 4]] + 2 * [[0, 1, 2] if pruned == "pruned" else [0, 1, 2, 3, 4]]
    assert first["states"] == ["COMPLETE"] + 2 * ["PRUNED" if pruned == "pruned" else "COMPLETE"]
    assert second["best"] is None
    assert first["best"] == min(trial[-1][1] for trial in first["histories"][: 1 if pruned == "pruned" else None])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"objective": "loss"}, "objective.*'loss'"),
        ({"objective": "vision_gain"}, "vision_gain=True"),
        ({"direction": "maximize"}, "direction='maximize'"),
        ({"compute_objective": min}, "compute_objective="),
        ({"backend": "wandb"}, "backend.*'wandb'"),
    ],
)
def test_option_is_refused_before_any_trial_when_it_breaks_its_rule(tmp_path, options, told):
    trainer = searching_trainer(tmp_path)
    MIRCallback(Probe.from_pairs(pairs(2))).attach(trainer)
    with pytest.raises(ConfigError, match=told):
        hyperparameter_search(trainer, **options)


def test_trainer_is_refused_when_a_trial_could_not_be_measured_or_made(tmp_path):
    trainer = searching_trainer(tmp_path)
    with pytest.raises(ConfigError, match="MIRCallback, got a Trainer with 0"):
        hyperparameter_search(trainer)
    with pytest.raises(ConfigError, match="MIRCallback, got a str with 0"):
        hyperparameter_search("trainer")
    plain = make_trainer(tmp_path)
    MIRCallback(Probe.from_pairs(pairs(2))).attach(plain)
    with pytest.raises(ConfigError, match="model_init"):
        hyperparameter_search(plain)


def test_objective_is_that_of_the_newest_or_the_lowest_record():
    history = [EvalRecord(step=step, mir=mir) for step, mir in enumerate([1.0, 3.0, 2.0, 2.5])]
    assert objective_record(history, "mir") is history[3]
    assert objective_record(history, "mir_best") is history[2]  # the untrained weights are no candidate
    assert objective_record(history[:1], "mir_best") is history[0]
    failed = [*history, EvalRecord(step=4)]
    assert objective_record(failed, "mir") is None
    assert objective_record(failed, "mir_best") is None
    assert objective_record([], "mir") is None
    assert not math.isnan(objective_record(history, "mir")["mir"])
