# SPDX-License-Identifier: Apache-2.0
"""Probes from Hugging Face datasets, real ones on disk."""

import datasets
import pytest

from mir_callback import Probe
from mir_callback.errors import ProbeError
from mir_callback.probe.sources import open_dataset
from tests.samples import image_of, pairs, write_folders

FEATURES = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})


@pytest.fixture
def dataset():
    images, texts = zip(*pairs(12), strict=True)
    return datasets.Dataset.from_dict({"image": list(images), "text": list(texts)}, features=FEATURES)


def test_rows_are_drawn_with_image_and_text_together(dataset):
    probe = Probe.from_dataset(dataset, num_samples=5, seed=1)
    assert probe.fingerprint == Probe.from_dataset(dataset, num_samples=5, seed=1).fingerprint
    assert probe.fingerprint != Probe.from_dataset(dataset, num_samples=5, seed=2).fingerprint
    assert probe.matched
    for sample in probe.samples:
        row = int(sample.name.removeprefix("row "))
        assert sample.text == dataset[row]["text"]
        assert sample.open_image().tobytes() == dataset[row]["image"].convert("RGB").tobytes()


def test_bytes_are_those_of_the_stored_files(tmp_path):
    folder, _ = write_folders(tmp_path, 4)
    files = sorted(str(path) for path in folder.rglob("*.png"))
    linked = datasets.Dataset.from_dict({"image": files, "text": ["a text"] * 4}, features=FEATURES)
    probe = Probe.from_dataset(linked, num_samples=4)
    stored = {path.read_bytes() for path in folder.rglob("*.png")}
    assert {image_of(sample) for sample in probe.samples} == stored


def test_texts_can_come_from_a_folder_or_another_dataset(dataset, tmp_path):
    _, texts = write_folders(tmp_path, 12, seed=9)
    from_folder = Probe.from_dataset(dataset, num_samples=5, texts=texts)
    assert not from_folder.matched
    assert {sample.text for sample in from_folder.samples} <= {path.read_text() for path in texts.rglob("*.txt")}
    articles = datasets.Dataset.from_dict({"article": [f"story {i}" for i in range(8)]})
    with pytest.raises(ProbeError, match="text_column='text'.*: article"):
        Probe.from_dataset(dataset, num_samples=5, texts=articles)
    renamed = articles.rename_column("article", "text")
    assert all(s.text.startswith("story") for s in Probe.from_dataset(dataset, num_samples=5, texts=renamed).samples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 13}, "num_samples=13.* 12 "),
        ({"image_column": "picture"}, "image_column='picture'.*: image, text"),
        ({"image_column": "text"}, "image_column='text'.* Value"),
        ({"text_column": "image"}, "text_column='image'.* row \\d"),
    ],
)
def test_error_names_the_column(dataset, options, message):
    with pytest.raises(ProbeError, match=message):
        Probe.from_dataset(dataset, **{"num_samples": 3, **options})


def test_error_when_it_is_not_one_split_or_is_streamed(dataset):
    for wrong in (datasets.DatasetDict({"train": dataset}), dataset.to_iterable_dataset(), [1, 2]):
        with pytest.raises(ProbeError, match=f"dataset is a {type(wrong).__name__}.* one split"):
            Probe.from_dataset(wrong, num_samples=3)


def test_error_names_the_row_without_an_image(dataset):
    holes = datasets.Dataset.from_dict({"image": [None], "text": ["a"]}, features=FEATURES)
    with pytest.raises(ProbeError, match="image of row 0 is None"):
        Probe.from_dataset(holes, num_samples=1)


def test_saved_datasets_and_plain_folders_open_by_path(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"val": dataset}).save_to_disk(tmp_path / "splits")
    write_folders(tmp_path, 3)
    expected = Probe.from_dataset(dataset, num_samples=3).fingerprint
    for path in ("one", "splits"):
        opened = open_dataset(str(tmp_path / path), "val")
        assert Probe.from_dataset(opened, num_samples=3).fingerprint == expected
    with pytest.raises(ProbeError, match="split nope of dataset .* KeyError"):
        open_dataset(str(tmp_path / "splits"), "nope")
    assert len(open_dataset(str(tmp_path / "images"), "train")) == 3
