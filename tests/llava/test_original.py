# SPDX-License-Identifier: Apache-2.0
"""The real LLaVA package in its own environment: its training script with one line added, and its models' values.

`make test` builds that environment (`.venv-llava`, pinned by constraints-llava.txt) beside the main one.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mir_callback import Probe
from mir_callback.history import read_history
from mir_callback.record import lowest_record
from tests.distributed.launch import ROOT, extensions_of, run_process, run_ranks
from tests.llava.conftest import PYTHON
from tests.llava.value_cases import IMAGE_MODES, VALUE_CASES
from tests.training.digest import digest

STEPS = 4
EXAMPLE = ROOT / "examples" / "llava_v1_5"


@pytest.fixture(scope="module")
def values(assets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("values")
    return run_ranks("tests.llava.value_worker", folder, str(assets), processes=None, python=PYTHON)[0]


@pytest.mark.parametrize("case", VALUE_CASES)
def test_value_equals_the_authors_procedure_at_every_batch_size(values, case):
    found = values["values"][case]
    assert found["ours"] == pytest.approx([found["authors"]] * 3, abs=1e-5)


def test_vision_gain_equals_that_of_the_models_own_loss_when_images_differ_in_tokens(values):
    gain = values["gain"]
    assert gain["ours"] == pytest.approx(gain["by labels"], abs=1e-6)
    assert abs(gain["ours"]) > 1e-5


def test_a_conversation_written_out_gives_its_token_ids(values):
    assert all(same for _, same in values["written"].values())
    assert values["written"]["plain"][0] == "{image}{text}\n"
    # The form in which the authors' script puts every sample.
    assert re.fullmatch(r"A chat .* USER: \{image\}\n ASSISTANT: \{text\}</s>", values["written"]["vicuna_v1"][0])


def test_padding_side_does_not_change_the_value(values):
    for template in ("plain", "v1"):
        left, right = (values["values"][f"{case}, {template}"]["ours"][1] for case in ("left padding", "square"))
        assert left == pytest.approx(right, abs=1e-5)


def test_masks_follow_the_models_expansion_for_several_images_and_none(values):
    vision, text, lengths = values["mixed"]
    assert vision == [32, 16, 0]
    # After the last image of the first two rows stands one and the same word; the row without an image has neither.
    assert text[0] == text[1] > 0
    assert text[2] == 0
    assert lengths[2] > 0


@pytest.mark.parametrize("mode", IMAGE_MODES)
def test_value_equals_the_authors_procedure_for_image_files_of_every_colour_mode(values, mode):
    found = values["modes"][mode]
    assert found["ours"] == pytest.approx([found["authors"]] * 3, abs=1e-5)


def arguments(assets, output, zero):
    """LLaVA's published stage-1 command, at tiny size; on one process with stage 2's kind of data."""
    given = {
        "model_name_or_path": assets / "tiny-vicuna",
        "version": "plain",
        "data_path": assets / "data.json",
        "image_folder": assets / "train" / "images",
        "vision_tower": assets / "tiny-clip-vit",
        "mm_projector_type": "mlp2x_gelu",
        "tune_mm_mlp_adapter": True,
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "output_dir": output,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        # accelerate 0.21 opens no_sync() to accumulate, which DeepSpeed 0.19 refuses from stage 2 on.
        "gradient_accumulation_steps": 2 if zero is None else 1,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "model_max_length": 128,
        "lazy_preprocess": True,
        "report_to": "none",
    }
    if zero is None:
        # Conversations with and without an image, as in stage 2; "plain" takes none without.
        given |= {"use_cpu": True, "version": "v1", "data_path": assets / "mixed_data.json", "model_max_length": 512}
    else:
        given["deepspeed"] = EXAMPLE / f"zero{zero}.json"
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def runs(assets, tmp_path_factory):
    """Run a set-up once, with or without the line; (output folder, what the ranks wrote)."""
    done = {}

    def run(zero, watched):
        if (zero, watched) not in done:
            folder = tmp_path_factory.mktemp(f"llava-{zero}-{watched}")
            command = [watched, str(assets / "probe"), "--", *arguments(assets, folder / "output", zero)]
            ranks = run_ranks(
                "tests.llava.train_worker",
                folder,
                *command,
                processes=None if zero is None else 2,
                python=PYTHON,
            )
            done[zero, watched] = folder / "output", ranks
        return done[zero, watched]

    return run


@pytest.mark.parametrize("zero", [None, "2", "3"])
def test_loss_log_is_identical_and_every_step_present(runs, zero):
    plain, watched = runs(zero, "off")[1], runs(zero, "on")[1]
    assert [entry[0] for entry in plain[0]["log"]] == list(range(1, STEPS + 1))
    assert [rank["log"] for rank in watched] == [rank["log"] for rank in plain]


def test_rows_with_and_without_an_image_were_trained_on_together(runs):
    # What test_loss_log_is_identical compares for one process.
    plain, watched = (runs(None, switch)[1][0]["images"] for switch in ("off", "on"))
    assert watched == plain
    assert any(sorted(batch) == [0, 1] for batch in plain)


@pytest.mark.parametrize("zero", [None, "2", "3"])
def test_trained_projector_is_identical_bit_by_bit(runs, zero):
    # The log rounds losses to four digits. Under ZeRO-3 the script's cast of the frozen tower to float16 only reaches
    # the empty tensors left of its shards, until the first forward: an evaluation must not be that forward.
    plain, watched = (torch.load(runs(zero, watched)[0] / "mm_projector.bin") for watched in ("off", "on"))
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


@pytest.mark.parametrize("zero", [None, "2", "3"])
def test_history_is_written_and_logged(runs, zero):
    output, ranks = runs(zero, "on")
    written = read_history(output / "mir_history.jsonl")
    assert [record.step for record in written] == [0, 2, 4]
    assert ranks[0]["history"] == written
    for rank in ranks:
        assert rank["logged"] == [[record.step, record.mir] for record in written]
    assert len({record.mir for record in written}) == 3


@pytest.mark.parametrize("zero", [pytest.param("2", marks=pytest.mark.slow), "3"])
def test_the_best_projector_is_kept_alone_and_training_stays_the_same(runs, zero):
    output, ranks = runs(zero, "best")
    plain = runs(zero, "off")
    assert [rank["log"] for rank in ranks] == [rank["log"] for rank in plain[1]]
    last = [torch.load(folder / "mm_projector.bin") for folder in (plain[0], output)]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])
    best = lowest_record(ranks[0]["history"])
    note = json.loads((output / "mir_best" / "mir_best.json").read_text())
    assert (note["step"], note["mir"]) == (best.step, best.mir)
    kept = torch.load(output / "mir_best" / "mm_projector.bin")
    assert kept.keys() == last[0].keys()  # what stage 2 reads with --pretrain_mm_mlp_adapter
    assert digest(kept) == ranks[0]["projectors"][str(best.step)]
    files = sorted(path.name for path in (output / "mir_best").iterdir())
    assert files == ["config.json", "mir_best.json", "mm_projector.bin"]
    # The script resumes from whatever this finds.
    assert not list(output.glob("checkpoint-*"))


@pytest.mark.slow
def test_outside_stage_1_the_whole_model_is_kept(assets, tmp_path):
    whole = arguments(assets, tmp_path / "output", None)
    whole[whole.index("--tune_mm_mlp_adapter") + 1] = "False"
    ranks = run_ranks(
        "tests.llava.train_worker",
        tmp_path,
        *["best", str(assets / "probe"), "--", *whole],
        processes=None,
        python=PYTHON,
    )
    best = lowest_record(ranks[0]["history"])
    kept = load_file(tmp_path / "output" / "mir_best" / "model.safetensors")
    assert (
        digest({name: kept[name] for name in kept if "mm_projector" in name})
        == (ranks[0]["projectors"][str(best.step)])
    )
    assert "lm_head.weight" in kept


def test_first_value_is_the_same_under_zero2_and_zero3(runs):
    # The script casts the vision tower to float16 except under ZeRO-3, which alone moves values by about 1e-4.
    first = [runs(zero, "on")[1][0]["history"][0]["mir"] for zero in ("2", "3")]
    assert first[0] == pytest.approx(first[1], abs=1e-3)


def test_unmodified_script_runs_under_the_launcher(assets, tmp_path):
    flags = ["--mir_images", assets / "probe" / "images", "--mir_texts", assets / "probe" / "texts"]
    flags += ["--mir_num_samples", 5, "--mir_every", 2, "--"]
    asked = ["-c", "from importlib.util import find_spec; print(find_spec('llava').submodule_search_locations[0])"]
    found = Path(run_process(asked, python=PYTHON).stdout.strip()) / "train" / "train.py"
    command = ["-m", "mir_callback.launch", *map(str, flags), str(found), *arguments(assets, tmp_path / "output", None)]
    done = run_process(command, python=PYTHON)
    assert done.returncode == 0, done.stderr[-3000:]
    log = json.loads((tmp_path / "output" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]
    assert [entry["step"] for entry in log if "mir" in entry] == [0, 2, 4]


def test_relaunching_the_same_command_works(assets, runs):
    # The script resumes from any checkpoint-* it finds, and would fail on one of ours.
    output, _ = runs(None, "on")
    again = run_ranks(
        "tests.llava.train_worker",
        output.parent / "again",
        *["on", str(assets / "probe"), "--", *arguments(assets, output, None)],
        processes=None,
        python=PYTHON,
    )
    assert [record["step"] for record in again[0]["history"]] == [0, 2, 4]
    assert len(list(output.glob("mir_history*.jsonl"))) == 2


def test_launcher_refuses_half_given_flags_before_the_script_starts(assets, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("print('started')")
    done = run_process(["-m", "mir_callback.launch", "--mir_images", "x", "--", str(script)], python=PYTHON)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error: Give both images and texts")]
    assert "Traceback" not in done.stderr
    assert "started" not in done.stdout


def test_launcher_names_the_versions_when_llava_met_a_transformers_too_new_for_it(assets, tmp_path):
    script = tmp_path / "train.py"
    # What transformers 4.53 took away, and llava's trainer imports.
    script.write_text(
        "import transformers.trainer as t; del t.ALL_LAYERNORM_LAYERS\n"
        "import transformers; transformers.__version__ = '4.53.3'\n"
        "import llava.train.train\n"
    )
    probe = [f"--mir_images={assets / 'probe' / 'images'}", f"--mir_texts={assets / 'probe' / 'texts'}"]
    flags = [*probe, "--mir_num_samples", "2", "--", str(script)]
    done = run_process(["-m", "mir_callback.launch", *flags], python=PYTHON)
    assert done.returncode == 1
    assert "[mir] WARNING: ImportError in llava: llava-torch 1.2.2.post1 is installed with transformers 4.53.3" in (
        done.stderr
    )
    assert "ImportError: cannot import name 'ALL_LAYERNORM_LAYERS'" in done.stderr


@pytest.mark.parametrize(
    ("zero", "probe_from"),
    [pytest.param("zero2.json", "folders", marks=pytest.mark.slow), ("zero3.json", "saved")],
)
def test_the_published_recipe_runs_as_written(assets, tmp_path, zero, probe_from):
    probe = Probe.from_folders(assets / "probe" / "images", assets / "probe" / "texts", num_samples=5)
    sources = {
        "folders": {"MIR_IMAGES": assets / "probe" / "images", "MIR_TEXTS": assets / "probe" / "texts"},
        "saved": {"MIR_PROBE": probe.save(tmp_path / "probe.zip")},
    }
    data = tmp_path / "data"
    data.mkdir()
    (data / "blip_laion_cc_sbu_558k.json").symlink_to(assets / "data.json")
    (data / "images").symlink_to(assets / "train" / "images")
    surroundings = {
        "LAUNCH": f"{PYTHON} -m torch.distributed.run --standalone --nproc_per_node 2 -m",
        "SCRIPT": ROOT / "tests" / "llava" / "cpu_train.py",
        "LANGUAGE_MODEL": assets / "tiny-vicuna",
        "VISION_TOWER": assets / "tiny-clip-vit",
        "DATA": data,
        "ZERO": EXAMPLE / zero,
        "OUTPUT": tmp_path / "output",
        "MIR_SAMPLES": 5,
        "MIR_EVERY": 2,
        **sources[probe_from],
    }
    smaller = "--bf16 False --tf32 False --max_steps 4 --per_device_train_batch_size 2 --dataloader_num_workers 0"
    done = run_process(
        [str(EXAMPLE / "pretrain.sh"), *smaller.split(), "--report_to", "none", "--model_max_length", "128"],
        python="bash",
        environment={name: str(value) for name, value in surroundings.items()} | extensions_of(PYTHON),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    state = tmp_path / "output" / "trainer_state.json"
    log = json.loads(state.read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]
    assert [entry["step"] for entry in log if "mir" in entry] == [0, 2, 4]
    first = json.loads((tmp_path / "output" / "mir_history.jsonl").read_text().splitlines()[0])
    assert first["probe_fingerprint"] == probe.fingerprint
    assert (tmp_path / "output" / "mm_projector.bin").exists()


def test_nothing_we_write_is_taken_for_a_checkpoint(runs):
    output, _ = runs(None, "on")
    assert not list(output.glob("checkpoint-*"))
    assert (output / "mm_projector.bin").exists()
