# SPDX-License-Identifier: Apache-2.0
"""`mir probe`, from the command line to the files it leaves."""

import json
import subprocess
import sys
from functools import partial

import datasets
import pytest
from PIL import Image

from mir_callback import Probe
from tests import tiny_models
from tests.commands.running import run_command
from tests.samples import pairs, write_folders, write_llava_json


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return [str(folder) for folder in write_folders(tmp_path, 8)]


mir = partial(run_command, "probe")


def test_a_probe_is_built_shown_saved_and_found_again(folders, capsys):
    images, texts = folders
    flags = ["--images", images, "--texts", texts, "--num-samples", 6, "--seed", 2]
    status, told, _ = mir(capsys, *flags, "--save", "p.zip", "--show", "p.png")
    expected = Probe.from_folders(images, texts, num_samples=6, seed=2)
    assert status == 0
    assert f"probe {expected.fingerprint}: 6 samples" in told
    assert Probe.load("p.zip") == expected
    with Image.open("p.png") as sheet:
        assert sheet.width > 500
    status, again, _ = mir(capsys, "p.zip")
    assert status == 0
    assert again.splitlines()[0] == told.splitlines()[0]


def test_other_sources(folders, capsys, tmp_path):
    _, texts = folders
    json_file, images = write_llava_json(tmp_path, 8)
    rows = {"picture": [image for image, _ in pairs(8)], "text": [text for _, text in pairs(8)]}
    features = datasets.Features({"picture": datasets.Image(), "text": datasets.Value("string")})
    dataset = datasets.Dataset.from_dict(rows, features=features)
    dataset.save_to_disk(tmp_path / "data")
    (tmp_path / "q.jsonl").write_text('{"image": "part0/000.png"}\n{"image": "part1/003.png"}\n')
    for flags, expected in [
        (["--llava-json", json_file, "--images", images], Probe.from_llava_json(json_file, images, 2)),
        (
            ["--questions", "q.jsonl", "--images", images, "--texts", texts],
            Probe.from_textvqa("q.jsonl", images, texts, 2),
        ),
        (
            ["--dataset", "data", "--image-column", "picture"],
            Probe.from_dataset(dataset, 2, image_column="picture"),
        ),
        (
            ["--dataset", "data", "--image-column", "picture", "--texts", texts],
            Probe.from_dataset(dataset, 2, image_column="picture", texts=texts),
        ),
    ]:
        status, told, error = mir(capsys, *flags, "--num-samples", 2)
        assert status == 0, error
        assert expected.fingerprint in told, flags


def test_samples_of_any_layout_are_drawn_and_described(folders, capsys, tmp_path):
    turns = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "both"}]
    names = ["part0/000.png", "part1/001.png"]
    records = [{"id": i, "image": names, "conversations": turns} for i in range(3)]
    records.append({"id": 3, "video": "part0", "conversations": [{"from": "human", "value": "<video> seen"}]})
    (tmp_path / "data.json").write_text(json.dumps(records))
    flags = ["--llava-json", "data.json", "--images", folders[0], "--layouts", "images", "--video-frames", 2]
    status, told, error = mir(capsys, *flags, "--num-samples", 4, "--save", "p.zip", "--show", "p.png")
    assert status == 0, error
    assert "2 images and 2 texts: 3\n" in told
    assert "1 video, then 1 text: 1\n" in told
    assert f"probe {Probe.load('p.zip').fingerprint}: 4 samples" in told
    status, _, error = mir(capsys, *flags[:4], "--num-samples", 1)
    assert status == 2
    assert "layouts='pairs' leaves out 4 more" in error


def test_tokens_are_counted_as_the_model_makes_them(folders, capsys, tmp_path):
    model, processor = tiny_models.llava()
    model.config.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    processor.tokenizer.save_pretrained(tmp_path / "tokenizer")
    flags = ["--images", folders[0], "--texts", folders[1], "--num-samples", 4]
    status, told, error = mir(capsys, *flags, "--model", "model")
    assert status == 0, error
    assert "vision tokens 16 per sample, 64 in total" in told
    assert "tokens fingerprint" in told
    status, told, error = mir(capsys, *flags, "--model", "tokenizer")
    assert status == 0, error
    assert "text tokens" in told
    assert "vision tokens not counted" in told


def test_what_a_run_would_read_is_shown_with_the_options_of_a_run(folders, capsys, tmp_path):
    model, processor = tiny_models.llava()
    model.config.save_pretrained("model")
    processor.save_pretrained("own")
    Probe.from_samples([*([image, text] for image, text in pairs(2)), ["a text alone"]]).save("p.zip")
    read = ["p.zip", "--model", "model", "--processor", "own"]
    status, told, error = mir(capsys, *read)
    assert status == 0, error
    assert "1 without an image or a video, which count only with text_only='count'" in told
    assert "vision tokens 0 to 16" in told
    status, counted, error = mir(capsys, *read, "--text-only", "count", "--text-positions", "all")
    assert status == 0, error
    assert "without an image" not in counted
    assert counted.rpartition("fingerprint")[2] != told.rpartition("fingerprint")[2]
    Probe.from_pairs(pairs(2)).save("pairs.zip")
    status, told, error = mir(capsys, "pairs.zip", *read[1:], "--prompt", "see {image} now: {text}")
    assert status == 0, error
    assert "see" in told
    assert "now:" in told
    processor.tokenizer.save_pretrained("tokenizer")
    for wrong in (["--model", "tokenizer", "--prompt", "chat"], ["--model", "tokenizer", "--processor", "own"]):
        status, _, error = mir(capsys, "pairs.zip", *wrong)
        assert status == 2, error
        assert "Traceback" not in error
        assert "tokenizer" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--images is needed to build a probe (or name a saved one)"),
        (["--images", "images"], "--texts is needed to build a probe"),
        (["--images", "images", "--texts", "texts"], "num_samples=100, but images has only 8 usable items"),
        (["--llava-json", "x", "--dataset", "y"], "--llava-json and --dataset exclude each other"),
        (["--llava-json", "x", "--texts", "texts"], "--images is needed with --llava-json"),
        (["--dataset", "x", "--images", "images"], "--images images cannot be used with --dataset"),
        (["p.zip"], "There is no probe at p.zip"),
        (["images"], "folder images is not a saved probe"),
        (["/dev/null"], "/dev/null is not a saved probe"),
        (["--images", "", "--texts", "texts"], "--images is empty"),
        (["--images", "images", "--texts", "texts", "--split", "train"], "--split needs --dataset"),
        (
            ["--images", "images", "--texts", "texts", "--num-samples", "2", "--save", "/proc/p.zip"],
            "Could not write the probe to /proc/p.zip",
        ),
        (
            ["--images", "images", "--texts", "texts", "--num-samples", "2", "--show", "/proc/p.png"],
            "/proc/p.png",
        ),
        (
            ["--images", "images", "--texts", "texts", "--num-samples", "2", "--save", "/dev/full"],
            "overwrite /dev/full",
        ),
        (["--images", "images", "--texts", "texts", "--layouts", "all"], "--layouts needs --llava-json or --dataset"),
        (["p.zip", "--layouts", "all"], "(p.zip) excludes --layouts"),
        (["p.zip", "--seed", "1"], "(p.zip) excludes --seed"),
        (["p.zip", "--prompt", "chat"], "--prompt needs --model"),
        (["p.zip", "--model", "m", "--vision-ids", "a"], "vision_ids"),
        (["--images", "images", "--texts", "texts", "--show", "p.txt"], "The contact sheet p.txt"),
        (
            ["--images", "images", "--texts", "texts", "--num-samples", "2", "--model", "nowhere"],
            "--model nowhere",
        ),
    ],
)
def test_an_error_is_one_line_and_status_two(folders, capsys, flags, message):
    status, _, error = mir(capsys, *flags)
    assert status == 2
    assert message in error
    assert error.startswith("mir probe: error: ")
    assert "Traceback" not in error


def test_the_command_runs_as_a_module_and_refuses_unknown_flags(folders):
    command = [sys.executable, "-m", "mir_callback", "probe"]
    done = subprocess.run([*command, "--nonsense"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unrecognized arguments: --nonsense" in done.stderr
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "examples:" in done.stdout
