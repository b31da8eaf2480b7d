# SPDX-License-Identifier: Apache-2.0
"""MIRMonitor by itself, without any loop: tests/loops has those, tests/training the Hugging Face Trainer."""

import inspect
import math

import numpy as np
import pytest
import schedulefree
import torch
import wandb
from accelerate import Accelerator
from transformers import AutoProcessor

from mir_callback import MIRConfig, MIRMonitor, PlateauRule, Probe, Verdict, evaluate_mir
from mir_callback.errors import ConfigError, HistoryError, NumericsError
from mir_callback.history import read_history
from mir_callback.monitor import Decision, DryRunDone, stage_of
from mir_callback.schedule import EveryEpochs
from tests import tiny_models
from tests.logs import logged, logged_here
from tests.samples import pairs
from tests.training import wandb_file


@pytest.fixture(scope="module")
def probe():
    return Probe.from_pairs(pairs(4))


@pytest.fixture
def monitored(tmp_path, probe):
    """Makes a monitor of a fresh model, which is its `.model`, in the test's folder."""

    def make(model=None, **options):
        fresh, processor = tiny_models.llava()
        model = fresh if model is None else model
        made = MIRMonitor(model, probe, processor=processor, output_dir=tmp_path, **{"every": 2, **options})
        made.model = model
        return made

    return make


def steps_of(records):
    return [record.step for record in records]


def poison(model, value=math.nan):
    """Make every evaluation fail from now on."""
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.down_proj.weight.fill_(value)


class AtStep:
    """Finds a plateau at one step."""

    def __init__(self, step):
        self.step = step

    def verdict(self, records):
        return Verdict("plateau" if records[-1].step == self.step else "going on", "because the test says so")


def test_a_training_stage_is_the_same_whatever_the_model_is_wrapped_in():
    model, _ = tiny_models.llava()
    wrapped = torch.nn.Module()
    wrapped.module = torch.compile(model, backend="eager")  # as DDP has it
    assert stage_of(wrapped) == stage_of(model)
    model.lm_head.requires_grad_(False)
    assert stage_of(wrapped) != stage_of(tiny_models.llava()[0])


# --- when ---


def test_evaluates_at_start_where_due_and_at_the_end(tmp_path, monitored):
    monitor = monitored(total_steps=5)
    decisions = [monitor.step(step) for step in range(1, 6)]
    assert steps_of(filter(None, (each.record for each in decisions))) == [2, 4]
    assert not any(each.stop for each in decisions)
    assert decisions[0] == Decision(stop=False, record=None)
    assert monitor.close().record.step == 5
    assert steps_of(monitor.history) == [0, 2, 4, 5]
    assert read_history(tmp_path / "mir_history.jsonl") == monitor.history
    assert {record.max_steps for record in monitor.history} == {5}


def test_value_is_that_of_evaluate_mir(monitored, probe):
    monitor = monitored()
    found = evaluate_mir(monitor.model, probe, processor=tiny_models.llava()[1])
    assert monitor.history[0].mir == found.mir


def test_the_last_step_is_evaluated_once(monitored):
    monitor = monitored()
    assert monitor.step(2).record.step == 2
    assert monitor.close().record is None
    monitor.step(3)
    assert monitor.close().record.step == 3
    assert monitor.close().record is None
    assert steps_of(monitor.history) == [0, 2, 3]


def test_nothing_is_evaluated_at_the_end_if_that_is_not_asked_for(monitored):
    monitor = monitored(also_on=("start",))
    monitor.step(3)
    assert monitor.close().record is None
    other = monitored()
    other.step(3)
    assert other.close(evaluate=False).record is None


def test_evaluate_does_so_whatever_the_schedule_says_but_once_a_step(monitored):
    monitor = monitored(also_on="none")
    assert monitor.history == []
    monitor.step(1)
    assert monitor.evaluate().step == 1
    assert monitor.evaluate() is None


def test_epochs_are_needed_where_the_schedule_counts_them(monitored):
    monitor = monitored(every=EveryEpochs(0.5))
    with pytest.raises(ConfigError, match=r"epoch: monitor.step\(step, epoch="):
        monitor.step(1)
    due = [monitor.step(step, epoch=step / 4).record for step in (1, 2, 3, 4)]
    assert steps_of(filter(None, due)) == [2, 4]
    assert due[1].epoch == 0.5


def test_steps_that_begin_anew_with_an_epoch_are_refused(monitored):
    monitor = monitored()
    monitor.step(3)
    monitor.step(3)  # a micro-batch later
    with pytest.raises(ConfigError, match="step 1 after step 3"):
        monitor.step(1)


def test_a_run_that_begins_in_the_middle_is_told_of_start_step(monitored):
    with logged("first step is 1001.*start_step"):
        monitored().step(1001)
    with logged():
        monitor = monitored()
        monitor.step(1)
        monitor.step(7)
        monitor.close(evaluate=False)
        monitored(start_step=7).step(9)


def test_records_have_the_seeds_of_the_run(tmp_path, monitored):
    for given, kept in (({"seed": np.int64(7)}, (7, None)), ({"seed": 0, "data_seed": 2**63}, (0, 2**63))):
        monitor = monitored(**given)
        monitor.close()
        assert [(each.seed, each.data_seed) for each in read_history(tmp_path / "mir_history.jsonl")] == [kept]
    for wrong in (True, 1.5, "7", 2**64):
        with pytest.raises(ConfigError, match=f"data_seed={wrong!r}"):
            monitored(data_seed=wrong)


def test_a_dry_run_evaluates_once_says_what_it_costs_and_ends(tmp_path, monitored):
    with logged_here(level=20) as said, pytest.raises(DryRunDone) as done:
        monitored(dry_run=True, total_steps=6)
    assert done.value.code == 0
    assert any("4 evaluations in 6 steps" in line for line in said)
    assert not (tmp_path / "mir_history.jsonl").exists()


# --- stopping ---


def test_stop_holds_from_its_step_on_and_nothing_is_evaluated_any_more(monitored):
    monitor = monitored(stop=AtStep(4))
    assert [monitor.step(step).stop for step in (2, 3, 4, 5, 6)] == [False, False, True, True, True]
    assert monitor.should_stop
    assert monitor.close() == Decision(stop=True, record=None)
    assert steps_of(monitor.history) == [0, 2, 4]
    assert monitor.history[-1].verdict == "plateau"


def test_a_run_resumed_where_it_was_stopped_stays_stopped_unless_told_to_go_on(monitored):
    monitored(stop=AtStep(2)).step(2)
    resumed = monitored(stop=AtStep(2), start_step=2)
    assert resumed.is_already_stopped
    assert resumed.step(3).stop
    assert steps_of(resumed.history) == [0, 2]
    resumed.close()
    assert not monitored(start_step=2).should_stop  # without a rule
    assert not monitored(stop=PlateauRule(observe_only=True), start_step=2).should_stop
    going_on = monitored(stop=AtStep(2), start_step=2, continue_after_stop=True)
    assert not going_on.is_already_stopped
    assert not going_on.step(4).stop
    assert steps_of(going_on.history) == [0, 2, 4]


# --- resuming ---


def test_resumed_run_continues_the_history_up_to_its_step(tmp_path, monitored):
    first = monitored()
    for step in range(1, 7):
        first.step(step)
    first.close()
    resumed = monitored(start_step=4)
    assert resumed.history == first.history[:3]
    resumed.step(5)
    resumed.step(6)
    assert steps_of(resumed.history) == [0, 2, 4, 6]
    assert resumed.history[3].mir == first.history[3].mir
    (branch,) = tmp_path.glob("mir_history.*.jsonl")
    assert steps_of(read_history(branch)) == [0, 2, 4, 6]


def test_resumed_run_makes_up_for_what_was_due_at_its_checkpoint(monitored):
    monitored(every=4).step(3)
    assert steps_of(monitored(every=4, start_step=4).history) == [0, 4]


def test_a_second_monitor_is_refused_where_another_one_runs(tmp_path, monitored):
    first = monitored()
    with pytest.raises(HistoryError, match="in use by another run of this process"):
        monitored()
    first.step(2)
    first.close()
    assert steps_of(read_history(tmp_path / "mir_history.jsonl")) == [0, 2]
    assert steps_of(monitored(start_step=2).history) == [0, 2]


def test_a_run_that_failed_keeps_nobody_out(tmp_path, monitored):
    first = monitored(on_error="raise")
    poison(first.model)
    with pytest.raises(NumericsError):
        first.step(2)
    assert steps_of(monitored(start_step=2).history) == [0, 2]
    assert steps_of(first.history) == [0]


def test_what_was_deleted_during_a_run_is_there_again_and_a_changed_history_is_not_touched(tmp_path, monitored):
    monitor = monitored(total_steps=4)
    (tmp_path / "mir_history.jsonl").unlink()
    with logged(r"mir_history\.jsonl was gone"):
        monitor.step(2)
    assert steps_of(read_history(tmp_path / "mir_history.jsonl")) == [0, 2]
    (tmp_path / "mir_history.jsonl").write_text("theirs")
    with logged(r"mir_history\.1\.jsonl"):
        monitor.step(4)
    monitor.close()
    assert (tmp_path / "mir_history.jsonl").read_text() == "theirs"
    assert read_history(tmp_path / "mir_history.1.jsonl") == monitor.history


def test_another_probe_is_refused_on_resume(tmp_path, monitored):
    monitored().step(2)
    model, processor = tiny_models.llava()
    other = Probe.from_pairs(pairs(3, seed=1))
    with pytest.raises(HistoryError, match="probe_fingerprint"):
        MIRMonitor(model, other, processor=processor, output_dir=tmp_path, start_step=2)


# --- what is told to it ---


class CountedLoss(torch.Tensor):
    """A loss that counts how often its value is read, which waits for a GPU."""

    read = 0

    def __float__(self):
        CountedLoss.read += 1
        return super().__float__()

    def detach(self):
        return super().detach().as_subclass(CountedLoss)


def test_the_loss_is_read_only_where_an_evaluation_is_due(monitored):
    monitor = monitored(every=3)
    for step in range(1, 7):
        monitor.step(step, loss=torch.tensor(step / 2).as_subclass(CountedLoss))
    assert CountedLoss.read == 2
    assert [record.loss for record in monitor.history] == [None, 1.5, 3.0]
    assert [record.loss_step for record in monitor.history] == [None, 3, 6]


def test_a_loss_with_its_graph_is_taken_without_a_warning(monitored, recwarn):
    loss = (torch.ones(2, requires_grad=True) * 3).sum()
    assert monitored().step(2, loss=loss).record.loss == 6.0
    assert not [warning for warning in recwarn if "scalar" in str(warning.message)]


@pytest.mark.parametrize("loss", [torch.ones(2), "high", [1.0]], ids=str)
def test_a_loss_that_is_no_number_is_left_out_and_said(monitored, loss):
    monitor = monitored()
    with logged("no loss.*is not one number"):
        record = monitor.step(2, loss=loss).record
    assert record.loss is None
    assert record.mir is not None


def test_a_loss_that_is_not_finite_is_left_out(monitored):
    record = monitored().step(2, loss=math.inf).record
    assert (record.loss, record.loss_step) == (None, None)


def test_what_a_step_tells_stands_in_the_record(monitored):
    monitor = monitored(start_status={"samples_seen": 0})
    record = monitor.step(2, loss=1.5, loss_step=1, epoch=0.25, samples_seen=64, tokens_seen=900).record
    assert (record.loss, record.loss_step, record.epoch) == (1.5, 1, 0.25)
    assert (record.samples_seen, record.tokens_seen) == (64, 900)


# --- where values go ---


class Writer:
    """As TensorBoard's."""

    def __init__(self):
        self.found = {}

    def add_scalar(self, name, value, step):
        self.found.setdefault(step, {})[name] = value


class Tracker:
    """As Accelerate and Fabric."""

    def __init__(self):
        self.found = {}

    def log(self, values, step):
        self.found[step] = values


@pytest.mark.parametrize("kind", ["function", "writer", "tracker"])
def test_values_go_to_what_the_loop_logs_with(monitored, kind):
    target = Writer() if kind == "writer" else Tracker()
    monitor = monitored(log=target.log if kind == "function" else target)
    monitor.step(2)
    assert sorted(target.found) == [0, 2]
    for record in monitor.history:
        assert target.found[record.step]["mir"] == record.mir
        assert target.found[record.step]["mir_layer/02"] == record.per_layer[1]


def test_what_fails_to_log_costs_a_warning(monitored):
    def fail(values, step):
        raise OSError("no space left")

    with logged("log=.*OSError: no space left") as found:
        monitor = monitored(log=fail, every=1)
        monitor.step(1)
    assert len(found) == 1
    assert len(monitor.history) == 2


def test_what_cannot_log_is_refused(monitored):
    with pytest.raises(ConfigError, match="log=3"):
        monitored(log=3)


@pytest.fixture
def wandb_folder(tmp_path, monkeypatch):
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    yield tmp_path
    wandb.teardown()


def test_wandb_rows_of_a_loop_lose_nothing_to_an_evaluation_of_the_same_step(monitored, wandb_folder):
    run = wandb.init()
    monitor = monitored(log=run)  # the active run, which is logged to anyway
    for step in range(1, 5):
        run.log({"loss": step / 10}, step=step)
        monitor.step(step)
        run.log({"accuracy": step / 100}, step=step)
    monitor.close()
    run.finish()
    rows = wandb_file.rows(wandb_folder)
    assert [row["loss"] for row in rows if "loss" in row] == [0.1, 0.2, 0.3, 0.4]
    assert [row["accuracy"] for row in rows if "accuracy" in row] == [0.01, 0.02, 0.03, 0.04]
    ours = {row["train/global_step"]: row["train/mir"] for row in rows if "train/mir" in row}
    assert ours == {record.step: record.mir for record in monitor.history}
    assert not any("mir" in row for row in rows)


def test_wandb_has_a_row_for_each_evaluation_where_the_loop_logs_nothing(monitored, wandb_folder):
    run = wandb.init()
    monitor = monitored(every=1)
    for step in range(1, 4):
        monitor.step(step)
    run.finish()
    rows = wandb_file.rows(wandb_folder)
    ours = [(row["train/global_step"], row["train/mir"]) for row in rows if "train/mir" in row]
    assert ours == [(record.step, record.mir) for record in monitor.history]


def test_wandb_of_accelerate_has_mir_in_the_row_of_the_loss(tmp_path, monitored, wandb_folder):
    accelerator = Accelerator(cpu=True, log_with="wandb", project_dir=tmp_path)
    accelerator.init_trackers("mir")
    monitor = monitored(log=accelerator)
    for step in range(1, 5):
        accelerator.log({"loss": step / 10}, step=step)
        monitor.step(step)
    wandb.finish()
    rows = wandb_file.rows(wandb_folder)
    assert [row["loss"] for row in rows if "loss" in row] == [0.1, 0.2, 0.3, 0.4]
    assert {row["_step"]: row["mir"] for row in rows if "mir" in row} == {
        record.step: record.mir for record in monitor.history
    }
    assert [row["loss"] for row in rows if "mir" in row and "loss" in row] == [0.2, 0.4]
    assert not any("train/mir" in row for row in rows)


# --- failures ---


def test_a_failing_first_evaluation_raises(tmp_path, monitored):
    model, _ = tiny_models.llava()
    poison(model)
    with pytest.raises(ValueError, match="layer 1: .* vision tokens are NaN"):
        monitored(model)
    assert read_history(tmp_path / "mir_history.jsonl") == []


def test_later_failures_are_tolerated_and_too_many_in_a_row_end_the_evaluations(tmp_path, monitored):
    monitor = monitored(every=1, max_failures=2)
    poison(monitor.model)
    with logged("step 1: MIR evaluation failed, training goes on: layer 1: "):
        failed = monitor.step(1).record
    assert (failed.mir, failed.verdict) == (None, None)
    assert failed.error.startswith("NumericsError: layer 1")
    with logged("step 2: .*2 evaluations in a row"):
        assert monitor.step(2).record.disabled is not None
    assert monitor.step(3).record is None
    assert monitor.close().record is None
    assert steps_of(read_history(tmp_path / "mir_history.jsonl")) == [0, 1, 2]


def test_failures_count_only_in_a_row(monitored):
    monitor = monitored(every=1, max_failures=2)
    for step, value in enumerate((math.nan, 0.0, math.nan, 0.0), start=1):
        poison(monitor.model, value)
        monitor.step(step)
    assert [record.mir is None for record in monitor.history] == [False, True, False, True, False]


def test_every_failure_raises_if_asked_to(monitored):
    monitor = monitored(every=1, on_error="raise")
    poison(monitor.model)
    with pytest.raises(ValueError, match="tokens are NaN"):
        monitor.step(1)


# --- the best model ---


def test_best_model_is_written_by_what_the_loop_saves_with(tmp_path, monitored):
    saved = []

    def save(folder):
        saved.append(folder)
        torch.save({}, folder / "weights.pt")

    monitor = monitored(keep_best=True, save_weights=save)
    monitor.step(2)
    assert len(saved) == 1
    assert (tmp_path / "mir_best" / "weights.pt").is_file()


class Bare(torch.nn.Module):
    """A model of one's own around another, which knows no save_pretrained."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.config = inner.config


def test_best_model_is_refused_where_it_cannot_be_saved(tmp_path, monitored):
    with pytest.raises(ConfigError, match="keep_best.*Bare has no save_pre"):
        monitored(Bare(tiny_models.llava()[0]), keep_best=True)
    assert not (tmp_path / "mir_history.jsonl").exists()


# --- options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batchsize": 5}, "'batchsize'.*batch_size"),
        ({"every": 0}, "every.* 0"),
        ({"probe": "folder"}, "probe='folder'"),
        ({"processor": None}, "Found no processor"),
    ],
)
def test_error_names_what_is_wrong_before_anything_is_written(tmp_path, probe, options, message):
    model, processor = tiny_models.llava()
    given = {"probe": probe, "processor": processor, **options}
    with pytest.raises(ConfigError, match=message):
        MIRMonitor(model, given.pop("probe"), output_dir=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_signature_shows_every_option_with_its_default():
    shown = inspect.signature(MIRMonitor).parameters
    for name, field in MIRConfig.__dataclass_fields__.items():
        assert shown[name].default == field.default
    assert list(shown)[:2] == ["model", "probe"]
    assert not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in shown.values())


@pytest.mark.parametrize("step", [2.0, "2", True, np.float64(2)])
def test_a_step_that_is_no_whole_number_is_refused(monitored, step):
    with pytest.raises(ConfigError, match="step=.*whole number"):
        monitored(every=1).step(step)


def test_numbers_of_numpy_and_torch_reach_the_history_as_they_are_and_others_are_left_out(tmp_path, monitored):
    monitor = monitored(every=1)
    with logged("ignored samples_seen") as messages:
        monitor.step(np.int64(1), loss=np.float32(2.5), samples_seen=64.0, tokens_seen=torch.tensor(7))
    record = read_history(tmp_path / "mir_history.jsonl")[-1]
    assert (record.step, record.loss, record.samples_seen, record.tokens_seen) == (1, 2.5, None, 7)
    assert monitor.history[-1] == record
    assert len(messages) == 1


def test_an_epoch_schedule_is_told_the_epoch_it_goes_on_from(monitored):
    with pytest.raises(ConfigError, match="epoch at start_step"):
        monitored(every=EveryEpochs(0.5), start_step=6)


def test_what_the_disk_refused_at_last_is_written_when_the_run_closes(tmp_path, monitored, monkeypatch):
    monitor = monitored(every=1)
    with monkeypatch.context() as full:
        full.setattr("os.fsync", lambda _descriptor: (_ for _ in ()).throw(OSError("no space left")))
        with logged("step 1: .*no space left"):
            monitor.step(1)
    monitor.close()
    assert read_history(tmp_path / "mir_history.jsonl") == monitor.history


def test_kept_weights_are_those_that_were_measured_when_the_optimizer_trains_others(tmp_path, monitored):
    model, processor = tiny_models.llava()
    optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.05)
    optimizer.train()
    probe = Probe.from_pairs(pairs(5))
    monitor = MIRMonitor(
        model, probe, processor=processor, optimizer=optimizer, output_dir=tmp_path / "run", every=1, keep_best=True
    )
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.sin(torch.arange(parameter.numel(), dtype=torch.float32)).view_as(parameter)
        optimizer.step()
    record = monitor.step(1).record
    kept = type(model).from_pretrained(tmp_path / "run" / "mir_best")
    read = AutoProcessor.from_pretrained(tmp_path / "run" / "mir_best")
    assert evaluate_mir(kept, probe, processor=read).mir == pytest.approx(record.mir, abs=1e-6)
    assert evaluate_mir(model, probe, processor=processor).mir != pytest.approx(record.mir, abs=1e-4)


def test_says_once_where_outliers_decide_the_error(monitored, monkeypatch):
    monkeypatch.setattr("mir_callback.record.JUMPS", 0.1)  # which any probe reaches
    with logged_here() as lines:
        monitor = monitored(total_steps=4)
        for step in range(1, 5):
            monitor.step(step)
        monitor.close()
    assert len([line for line in lines if "3-sigma" in line]) == 1
    assert all(record.outlier_se_ratio > 0.1 for record in monitor.history)


def test_errors_that_are_not_finite_cost_no_record(tmp_path, monitored, monkeypatch):
    monkeypatch.setattr(
        "mir_callback.evaluation.report.compute_standard_error", lambda found: math.nan * found.sum(dim=-1)
    )
    monitor = monitored()
    assert monitor.step(2).record.mir is not None
    monitor.close()
    for record in read_history(tmp_path / "mir_history.jsonl"):
        assert record.mir is not None
        assert (record.mir_se, record.per_layer_se, record.influences) == (None, None, None)
