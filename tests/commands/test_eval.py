# SPDX-License-Identifier: Apache-2.0
"""`mir eval`: values of saved checkpoints beside those that the run measured itself, and what cannot be opened."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mir_callback import MIRCallback, Probe, evaluate_mir
from mir_callback.history import read_history
from tests import tiny_models
from tests.commands.running import messages_of, run_command
from tests.distributed.adapter_worker import adapted
from tests.samples import pairs, write_folders
from tests.training.runs import make_trainer

STEPS = [2, 4, 6]
NUM_SAMPLES = 5


def train(folder, **options):
    """A run that measures itself and saves checkpoints at the same steps; its records."""
    trainer = make_trainer(folder, save_strategy="steps", save_steps=2, **options)
    callback = MIRCallback(Probe.from_pairs(pairs(NUM_SAMPLES)), every=2).attach(trainer)
    trainer.train()
    return callback.history


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    Probe.from_pairs(pairs(NUM_SAMPLES)).save(folder / "probe.zip")
    return folder, train(folder / "run")


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of that run in the working folder, with its probe beside it; its records."""
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return trained[1]


def mir(capsys, *arguments):
    return run_command("eval", capsys, *arguments, "--device", "cpu")


def results(path="run/mir_eval.jsonl"):
    return read_history(path)


def edit(file, change):
    """Change the weights in a safetensors file."""
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture
def own(run, tmp_path):
    """The bytes of the run's own history."""
    return (tmp_path / "run" / "mir_history.jsonl").read_bytes()


def test_every_checkpoint_has_the_value_the_run_measured_itself(run, own, tmp_path, capsys):
    status, told, error = mir(capsys, "run", "--probe", "probe.zip")
    assert status == 0, error
    written = results()
    assert [record.step for record in written] == STEPS
    for record, live in zip(written, run[1:], strict=True):
        assert record.mir == pytest.approx(live.mir, abs=1e-6)
        assert record.per_layer == pytest.approx(live.per_layer, rel=1e-5)
        for field in ("epoch", "probe_fingerprint", "tokens_fingerprint", "pixels_fingerprint", "root", "dtype"):
            assert record[field] == live[field]
        assert f"in training {live['mir']:.4f}" in told
    assert len({record.loss for record in written}) == len(STEPS)
    assert (tmp_path / "run" / "mir_history.jsonl").read_bytes() == own


def test_what_was_measured_is_not_measured_again_unless_told_or_saved_anew(run, tmp_path, capsys):
    first = mir(capsys, "run", "--probe", "probe.zip", "--every", 4)
    assert [record.step for record in results()] == [4]
    assert "  cached  " not in first[1]
    _, told, _ = mir(capsys, "run", "--probe", "probe.zip")
    assert [line for line in told.splitlines() if "  cached  " in line] == [
        line for line in told.splitlines() if "checkpoint-4" in line
    ]
    edit(tmp_path / "run" / "checkpoint-4" / "model.safetensors", lambda weights: None)
    before = results()
    _, told, _ = mir(capsys, "run", "--probe", "probe.zip")
    assert told.count("  cached  ") == 2
    assert [record.time for record in results()][::2] == [record.time for record in before][::2]
    assert results()[1].time > before[1].time
    _, told, _ = mir(capsys, "run", "--probe", "probe.zip", "--again")
    assert "  cached  " not in told
    _, told, _ = mir(capsys, "run", "--probe", "probe.zip", "--steps", "2,6", "--dtype", "bfloat16")
    assert [record.dtype for record in results()] == ["bfloat16", "float32", "bfloat16"]
    assert "dtype was float32 during training" in told


def test_vision_gain_needs_a_matched_probe_and_measures_again_what_lacks_it(run, tmp_path, capsys):
    words = ("run", "--steps", "6", "--probe")
    mir(capsys, *words, "probe.zip")
    status, _, error = mir(capsys, *words, "probe.zip", "--vision-gain")
    assert status == 2
    assert "Probe.from_llava_json" in error
    Probe.from_pairs(pairs(NUM_SAMPLES), matched=True).save(tmp_path / "matched.zip")
    told = [mir(capsys, *words, "matched.zip", *more)[1] for more in (["--vision-gain"], ["--vision-gain"], [])]
    assert [text.count("  cached  ") for text in told] == [0, 1, 1]
    assert f"  vision gain {results()[0].vision_gain:.4g}  " in told[0]


def test_records_are_printed_for_programs(run, capsys):
    status, told, error = mir(capsys, "run", "--probe", "probe.zip", "--steps", "2,4", "--json")
    assert status == 0
    assert [json.loads(line)["step"] for line in told.splitlines()] == [2, 4]
    assert "writing to" in error


def test_weights_that_do_not_load_completely_are_refused_by_name_and_the_rest_is_measured(run, tmp_path, capsys):
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    first, second = (tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors" for step in (2, 4))
    edit(first, lambda weights: weights.pop(name))
    edit(second, lambda weights: weights.update({"of.another.model": torch.zeros(2)}))
    status, _, error = mir(capsys, "run", "--probe", "probe.zip")
    assert status == 2
    assert [record.step for record in results()] == [6]
    lines = messages_of(error, "eval")
    assert any("checkpoint-2" in line and "missing" in line for line in lines)
    assert any("layers.1.mlp.up_proj.weight" in line for line in lines)
    assert any("checkpoint-4" in line and "unexpected of.another.model" in line for line in lines)
    assert lines[-1].startswith("mir eval: error: 2 could not be measured")
    assert "Traceback" not in error


def test_damaged_and_unfinished_checkpoints_are_told_in_one_line_each(run, tmp_path, capsys):
    (tmp_path / "run" / "checkpoint-2" / "model.safetensors").write_bytes(b"torn")
    (tmp_path / "run" / "checkpoint-4" / "model.safetensors").unlink()
    status, _, error = mir(capsys, "run", "--probe", "probe.zip")
    assert status == 2
    assert [record.step for record in results()] == [6]
    assert "checkpoint-2: Safetensor" in error
    assert "checkpoint-4, only config.json, generation_config.json" in error
    assert len(messages_of(error, "eval")) == 3


def test_a_diverged_checkpoint_is_recorded_as_failed_and_tried_again(run, tmp_path, capsys):
    file = tmp_path / "run" / "checkpoint-2" / "model.safetensors"
    edit(file, lambda weights: weights["language_model.model.layers.0.mlp.up_proj.weight"].fill_(torch.nan))
    for _ in range(2):
        status, told, _ = mir(capsys, "run", "--probe", "probe.zip", "--steps", "2")
        assert status == 2
        assert "failed: NumericsError: layer 1" in told
        assert "  cached  " not in told
    (record,) = results()
    assert (record.mir, record.per_layer) == (None, None)
    assert "tokens are NaN or infinite" in record.error


def test_a_finished_model_and_a_single_checkpoint_are_measured(run, tmp_path, capsys):
    model, processor = tiny_models.llava(seed=3)
    model.save_pretrained("finished")
    status, _, error = mir(capsys, "finished", "run/checkpoint-4", "--probe", "probe.zip")
    assert status == 2
    assert f"no processor in {tmp_path / 'finished'}" in error
    assert [record.step for record in results()] == [4]
    processor.save_pretrained("processor")
    status, _, error = mir(capsys, "finished", "--probe", "probe.zip", "--processor", "processor")
    assert status == 0, error
    expected = evaluate_mir(model, Probe.load("probe.zip"), processor=processor).mir
    (record,) = results("finished/mir_eval.jsonl")
    assert record.mir == pytest.approx(expected, abs=1e-6)


def test_the_weights_in_the_runs_own_folder_are_its_last_checkpoint(run, tmp_path, capsys):
    for file in (tmp_path / "run" / "checkpoint-6").iterdir():
        shutil.move(file, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-6").rmdir()
    status, told, error = mir(capsys, "run", "--probe", "probe.zip")
    assert status == 0, error
    assert [record.checkpoint for record in results()] == ["checkpoint-2", "checkpoint-4", "run"]
    assert results()[-1].mir == pytest.approx(run[-1].mir, abs=1e-6)


def test_a_probe_is_drawn_or_found_in_the_runs_folder(run, tmp_path, capsys):
    images, texts = write_folders(tmp_path / "data", 8)
    flags = ["--images", images, "--texts", texts, "--num-samples", 6, "--seed", 1]
    status, told, error = mir(capsys, "run", "--steps", 2, *flags)
    assert status == 0, error
    assert Probe.from_folders(images, texts, 6, seed=1).fingerprint in told
    assert "in training" not in told
    assert "probe_fingerprint was" in told
    status, _, error = mir(capsys, "run", "--steps", 2, "--history", "other.jsonl")
    assert status == 0, error
    assert results("other.jsonl")[0].mir == pytest.approx(run[1].mir, abs=1e-6)
    (tmp_path / "run" / "mir_probe.zip").unlink()
    status, _, error = mir(capsys, "run", "--steps", 2)
    assert status == 2
    assert f"no {tmp_path / 'run' / 'mir_probe.zip'}" in error


def test_another_prompt_than_in_training_is_said_and_not_shown_beside_it(run, capsys):
    flags = ["run", "--probe", "probe.zip", "--steps", 2, "--history", "prompts.jsonl"]
    status, told, _ = mir(capsys, *flags, "--prompt", "USER: {image} {text}")
    assert status == 0
    assert "prompt was {image}{text} during training and is USER: {image} {text} now: " in told
    assert "in training" not in told.replace("during training", "")
    status, _, error = mir(capsys, *flags)  # the run's own
    assert status == 2
    assert "another prompt: it was 'USER: {image} {text}' at step 2 and is '{image}{text}' now" in error


def test_the_prompt_is_that_of_the_runs_history_when_none_is_named(trained, tmp_path, capsys):
    trainer = make_trainer(tmp_path / "run", save_strategy="steps", save_steps=2, max_steps=2)
    probe = Probe.load(trained[0] / "probe.zip")
    live = MIRCallback(probe, every=2, prompt="USER: {image} {text}").attach(trainer)
    trainer.train()
    for cached in (0, 1):
        status, told, error = mir(capsys, tmp_path / "run")
        assert status == 0, error
        assert "the run's prompt: USER: {image} {text}" in told
        assert f"in training {live.history[-1].mir:.4f}" in told
        assert told.count("  cached  ") == cached


def test_weights_of_accelerates_save_state_need_a_config_that_may_be_elsewhere(run, tmp_path, capsys):
    (tmp_path / "run" / "checkpoint-2" / "config.json").unlink()
    flags = ["run/checkpoint-2", "--probe", "probe.zip"]
    status, _, error = mir(capsys, *flags)
    assert status == 2
    assert "checkpoint-2 has whole weights without a config.json, and " in error
    assert "Pass a model of the same architecture: --base" in error
    status, told, error = mir(capsys, *flags, "--base", "run/checkpoint-4")
    assert status == 0, error
    assert f"in training {run[1].mir:.4f}" in told


def test_values_made_differently_or_of_another_run_do_not_enter_a_history(run, own, tmp_path, capsys):
    assert mir(capsys, "run", "--probe", "probe.zip", "--steps", 2)[0] == 0
    kept = (tmp_path / "run" / "mir_eval.jsonl").read_bytes()
    Probe.from_pairs(pairs(4, seed=1)).save("another.zip")
    for flags, told in [
        (["run", "--probe", "another.zip"], "another probe_fingerprint"),
        (
            ["run", "--probe", "probe.zip", "--steps", 4, "--prompt", "{image} {text}"],
            "another prompt: it was '{image}{text}' at step 2 and is '{image} {text}' now",
        ),
        (["run", "--probe", "probe.zip", "--root", "paper_fast"], "another root: it was 'exact'"),
        (
            ["run/checkpoint-4", "--probe", "probe.zip", "--history", "run/mir_history.jsonl"],
            "has values of a run, written in training",
        ),
        (["other", "--probe", "probe.zip", "--history", "run/mir_eval.jsonl"], "not of checkpoints of ../other."),
    ]:
        shutil.copytree("run/checkpoint-6", "other", dirs_exist_ok=True)
        status, _, error = mir(capsys, *flags)
        assert status == 2
        assert told in error
    assert (tmp_path / "run" / "mir_eval.jsonl").read_bytes() == kept
    assert (tmp_path / "run" / "mir_history.jsonl").read_bytes() == own


def test_a_processor_of_another_model_is_refused(run, capsys):
    model, _ = tiny_models.llava()
    _, processor = tiny_models.idefics3()
    processor.save_pretrained("foreign")
    processor.tokenizer.save_pretrained("tokenizer")
    tiny_models.llava()[1].tokenizer.save_pretrained("bare")  # unlike the one before it names no processor's class
    model.resize_token_embeddings(300)
    model.save_pretrained("small")
    for flags, told in [
        (
            ["run", "--steps", 2, "--processor", "foreign"],
            "the model's own forward failed on probe samples",
        ),
        (["small", "--processor", "run/checkpoint-2"], "the vocabulary has 300"),
        (["run", "--steps", 2, "--processor", "nowhere"], "--processor nowhere"),
        (["run", "--steps", 2, "--processor", "run/checkpoint-2/tokenizer.json"], "tokenizer.json is a file"),
        (["run", "--steps", 2, "--processor", "tokenizer"], "the processor in tokenizer"),
        (["run", "--steps", 2, "--processor", "bare"], "processor in bare"),
        (["run", "--steps", 2, "--prompt", "{text}"], "prompt='{text}' has no {image}"),
        (["run", "--steps", 2, "--prompt", "v1"], "prompt='v1': LlavaForConditionalGeneration has no conversations"),
    ]:
        status, _, error = mir(capsys, *flags, "--probe", "probe.zip")
        assert status == 2
        assert told in error
        assert "Traceback" not in error


def test_a_peft_adapter_has_the_value_the_run_measured_itself(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    live = train("run", wrap=lambda model: adapted(model, "base", write=True))
    flags = ["run", "--probe", trained[0] / "probe.zip"]
    status, _, error = mir(capsys, *flags)
    assert status == 0, error
    assert [record.mir for record in results()] == pytest.approx([r.mir for r in live[1:]], abs=1e-6)
    edit("run/checkpoint-2/adapter_model.safetensors", lambda weights: weights.pop(sorted(weights)[-1]))
    shutil.move("base", "moved")
    status, _, error = mir(capsys, *flags, "--again")
    assert status == 2
    assert error.count("base_model_name_or_path in adapter_config.json") == 3
    status, _, error = mir(capsys, *flags, "--again", "--base", "moved")
    assert status == 2
    assert "checkpoint-2 do not match PeftModel" in error
    assert len(messages_of(error, "eval")) == 2
    assert mir(capsys, *flags, "--again", "--base", "run/checkpoint-4")[0] == 2


def test_mixed_precision_of_a_run_is_repeated(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    live = train("run", bf16=True)
    flags = ["run", "--probe", trained[0] / "probe.zip"]
    assert mir(capsys, *flags, "--autocast", "bfloat16")[0] == 0
    repeated = [record.mir for record in results()]
    assert repeated == pytest.approx([record.mir for record in live[1:]], abs=1e-6)
    assert mir(capsys, *flags)[0] == 0
    assert [record.mir for record in results()] != pytest.approx(repeated, abs=1e-6)


def test_a_hub_name_is_measured_as_its_snapshot(run, tmp_path, monkeypatch, capsys):
    snapshots = tmp_path / "hub" / "models--somebody--tiny"
    shutil.copytree("run/checkpoint-6", snapshots / "snapshots" / "abc")
    (snapshots / "refs").mkdir()
    (snapshots / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    status, _, error = mir(capsys, "somebody/tiny", "somebody/else", "--probe", "probe.zip")
    assert status == 2
    assert "the model somebody/else is no folder" in error
    (record,) = results("mir_eval.somebody--tiny.jsonl")
    assert (record.step, record.mir) == (6, pytest.approx(run[-1].mir, abs=1e-6))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nowhere"], "the model nowhere is no folder"),
        (["./nowhere"], "the model nowhere does not exist"),
        (["probe.zip"], "the model probe.zip is a file"),
        (["run", "--steps", "3"], "no checkpoint of step 3 (--steps), only 2, 4, 6"),
        (["run", "--every", "5"], "multiple of 5 (--every), only at steps 2, 4, 6"),
        (["run", "--every", "0"], "--every must be at least 1, got 0"),
        (["run", "--steps", "2", "--every", "2"], "--steps and --every"),
        (["run", "--images", "x"], "images='x'"),
        (["run", "--images", "x", "--texts", "y"], "either a probe, or images and texts"),
        (["run", "--seed", "1"], "--num-samples and --seed"),
        (["run", "other", "--history", "h.jsonl"], "--history is for a single run, got 2"),
        (["run", "--device", "gpu"], "--device gpu"),
        (["run", "--batch-size", "0"], "batch_size must be a positive integer (samples), got 0"),
        (["run", "--base", ""], "--base is empty"),
        (["run", "--history", "/proc/x/y"], "/proc/x/y"),
    ],
)
def test_an_error_is_one_line_and_status_two(run, capsys, flags, message):
    status, _, error = run_command("eval", capsys, *flags, "--probe", "probe.zip")
    assert status == 2
    assert message in error
    assert "Traceback" not in error
    assert messages_of(error, "eval")[-1].startswith("mir eval: error: ")
