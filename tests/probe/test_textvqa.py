# SPDX-License-Identifier: Apache-2.0
"""Probes from TextVQA question files, in both forms in which they are handed around."""

import json

import pytest
from PIL import Image

from mir_callback import Probe
from mir_callback.errors import ProbeError
from tests.samples import write_folders


@pytest.fixture
def folders(tmp_path):
    images = tmp_path / "train_images"
    images.mkdir()
    for index in range(6):
        Image.new("RGB", (20, 20), (40 * index, 0, 0)).save(images / f"img{index}.jpg")
    _, texts = write_folders(tmp_path, 6)
    return images, texts


def questions_file(path, names, form):
    if form == "json":
        data = [{"image_id": name, "question": "what?", "question_id": i} for i, name in enumerate(names)]
        path.write_text(json.dumps({"dataset_type": "val", "data": data}))
    else:
        path.write_text("\n".join(json.dumps({"question_id": n, "image": f"{n}.jpg", "text": "?"}) for n in names))
    return path


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_only_images_that_are_asked_about_are_drawn_each_once(folders, tmp_path, form):
    questions = questions_file(tmp_path / f"q.{form}", ["img1", "img3", "img3", "img4"], form)
    probe = Probe.from_textvqa(questions, *folders, num_samples=3)
    assert {sample.name.split()[0] for sample in probe.samples} == {"img1.jpg", "img3.jpg", "img4.jpg"}
    with pytest.raises(ProbeError, match="num_samples=4.* 3 "):
        Probe.from_textvqa(questions, *folders, num_samples=4)


def test_both_forms_of_a_file_give_the_same_probe(folders, tmp_path):
    probes = [
        Probe.from_textvqa(questions_file(tmp_path / f"q.{form}", ["img0", "img2", "img5"], form), *folders, 2, 1)
        for form in ("json", "jsonl")
    ]
    assert probes[0] == probes[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.json", "{", r"q\.jsonl? as JSON: JSONDecodeError"),
        ("q.jsonl", '{"image": "a.jpg"}\n{', r"q\.jsonl? as JSON: JSONDecodeError"),
        ("q.json", '{"data": 3}', "q.json has no list of questions"),
        ("q.json", '{"data": [{"question": "?"}]}', "Question 0 of q.json"),
        ("q.json", "[7]", "Question 0 of q.json"),
        ("q.json", '[{"image_id": "nope"}]', r"images.nope\.jpg: FileNotFoundError"),
    ],
)
def test_error_names_file_and_question(folders, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ProbeError, match=message):
        Probe.from_textvqa(tmp_path / name, *folders, num_samples=1)


def test_error_when_the_file_is_missing(folders, tmp_path):
    with pytest.raises(ProbeError, match=r"none\.json .*FileNotFoundError"):
        Probe.from_textvqa(tmp_path / "none.json", *folders, num_samples=1)
