# SPDX-License-Identifier: Apache-2.0
"""What MLflow, Trackio and SwanLab hold afterwards. `make test-all` runs this in `.venv-trackers`, which has them."""

import pytest
from accelerate import Accelerator

from mir_callback import MIRCallback, MIRMonitor, Probe
from tests import tiny_models
from tests.samples import pairs
from tests.training.runs import losses, make_trainer
from tests.training.test_reports import values_of

pytestmark = pytest.mark.trackers


@pytest.fixture(scope="module")
def probe():
    return Probe.from_pairs(pairs(4))


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory):
    """Trackio reads it once, when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        import trackio  # noqa: F401

        yield


def test_mlflow_has_every_value_at_its_step_and_the_definition(tmp_path, probe, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mir")
    trainer = make_trainer(tmp_path / "run", steps=2, report_to=["mlflow"])
    callback = MIRCallback(probe, every=1).attach(trainer)
    trainer.train()
    client = mlflow.MlflowClient(str(tmp_path / "mlruns"))
    (run,) = client.search_runs([client.get_experiment_by_name("mir").experiment_id])
    expected = values_of(callback)
    read = {
        (name, metric.step): metric.value
        for name in {name for name, _ in expected}
        for metric in client.get_metric_history(run.info.run_id, name)
    }
    assert read == pytest.approx(expected)
    assert [each.step for each in client.get_metric_history(run.info.run_id, "loss")] == [1, 2]
    assert run.data.params["mir.probe_fingerprint"] == probe.fingerprint
    assert run.data.params["mir.every"] == "EverySteps(steps=1)"


def test_trackio_has_every_value_at_its_step_and_the_definition(tmp_path, probe, trackio_folder):
    from trackio.sqlite_storage import SQLiteStorage

    trainer = make_trainer(tmp_path / "run", steps=2, report_to=["trackio"], project="mir", run_name="one")
    callback = MIRCallback(probe, every=1).attach(trainer)
    trainer.train()
    rows = SQLiteStorage.get_logs("mir", "one")
    assert [(row["train/global_step"], row["train/mir"]) for row in rows if "train/mir" in row] == [
        (record.step, record.mir) for record in callback.history
    ]
    assert [row["train/global_step"] for row in rows if "train/loss" in row] == [1, 2]
    assert SQLiteStorage.get_run_config("mir", "one")["mir"]["probe_fingerprint"] == probe.fingerprint


def test_swanlab_has_every_value_at_its_step_and_the_definition(tmp_path, probe):
    import swanlab
    import yaml
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    # transformers' reporter asks for a run before it makes one, which SwanLab 0.10 refuses.
    swanlab.init(project="mir", mode="offline", logdir=str(tmp_path / "swanlog"))
    trainer = make_trainer(tmp_path / "run", steps=2, report_to=["swanlab"])
    callback = MIRCallback(probe, every=1).attach(trainer)
    trainer.train()
    swanlab.finish()
    (file,) = tmp_path.glob("swanlog/run-*/run-*.swanlab")
    reader, read = DataStoreReader(), {}
    reader.open(file)
    for content in reader:
        record = Record.FromString(content)
        if record.HasField("scalar"):
            read[record.scalar.key, record.scalar.step] = record.scalar.value.number
    expected = {(f"train/{name}", step): value for (name, step), value in values_of(callback).items()}
    assert {key: value for key, value in read.items() if "mir" in key[0]} == pytest.approx(expected, rel=1e-6)
    assert [step for name, step in read if name == "train/loss"] == [step for step, _ in losses(trainer)] == [1, 2]
    settings = yaml.safe_load((file.parent / "files" / "config.yaml").read_text())
    assert settings["mir"]["value"]["probe_fingerprint"] == probe.fingerprint


@pytest.fixture
def loop(tmp_path, probe):
    """Runs a loop on Accelerate with one of its trackers; returns the monitor."""

    def run(tracker):
        accelerator = Accelerator(cpu=True, log_with=tracker, project_dir=tmp_path / "project")
        accelerator.init_trackers("loop")
        model, processor = tiny_models.llava()
        monitor = MIRMonitor(model, probe, processor=processor, output_dir=tmp_path, log=accelerator, every=2)
        for step in range(1, 4):
            accelerator.log({"loss": step / 10}, step=step)
            monitor.step(step)
        accelerator.end_training()
        return monitor

    return run


def test_mlflow_of_accelerate_has_mir_beside_the_loss(tmp_path, monkeypatch, loop):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    monitor, client = loop("mlflow"), mlflow.MlflowClient(str(tmp_path / "mlruns"))
    (run,) = client.search_runs([client.get_experiment_by_name("loop").experiment_id])
    read = {name: client.get_metric_history(run.info.run_id, name) for name in ("mir", "loss")}
    assert [(each.step, each.value) for each in read["mir"]] == [(each.step, each.mir) for each in monitor.history]
    assert [each.step for each in read["loss"]] == [1, 2, 3]


def test_trackio_of_accelerate_has_mir_beside_the_loss(trackio_folder, loop):
    from trackio.sqlite_storage import SQLiteStorage

    monitor = loop("trackio")
    (name,) = SQLiteStorage.get_runs("loop")
    rows = SQLiteStorage.get_logs("loop", name)
    assert [(row["step"], row["mir"]) for row in rows if "mir" in row] == [
        (each.step, each.mir) for each in monitor.history
    ]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
