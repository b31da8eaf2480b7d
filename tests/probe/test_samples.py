# SPDX-License-Identifier: Apache-2.0
"""Building, fingerprinting, saving and loading probes, and what is said when that cannot be."""

import dataclasses
import json
import os
import re
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from mir_callback import Probe
from mir_callback.errors import ConfigError, ProbeError
from mir_callback.probe.sample import Sample
from tests.samples import image_of, pairs, write_folders, write_llava_json


@pytest.fixture
def folders(tmp_path):
    return write_folders(tmp_path, 12)


def test_same_seed_draws_same_probe_wherever_the_folders_are(folders, tmp_path):
    probe = Probe.from_folders(*folders, num_samples=5, seed=3)
    elsewhere = tmp_path / "copy"
    for folder in folders:
        shutil.copytree(folder, elsewhere / folder.name)
    again = Probe.from_folders(elsewhere / "images", elsewhere / "texts", num_samples=5, seed=3)
    assert len(probe) == 5
    assert again.fingerprint == probe.fingerprint
    assert Probe.from_folders(*folders, num_samples=5, seed=4).fingerprint != probe.fingerprint


def test_fingerprint_changes_with_image_text_order_and_cut():
    probe = Probe.from_pairs(pairs(3))
    first, second, third = probe.samples
    variants = [
        Probe((first, third, second)),
        Probe((first, second)),
        Probe((first, second, Sample.pair("", image_of(third), third.text + "."))),
        Probe((first, second, Sample.pair("", image_of(first), third.text))),
        Probe(probe.samples, max_text_tokens=10),
    ]
    assert len({probe.fingerprint, *(variant.fingerprint for variant in variants)}) == 6


def test_names_of_samples_are_not_part_of_the_fingerprint():
    probe = Probe.from_pairs(pairs(2))
    renamed = Probe(tuple(dataclasses.replace(sample, name="x") for sample in probe.samples))
    assert renamed.fingerprint == probe.fingerprint


@pytest.mark.parametrize("name", ["probe.zip", "probe", "deep/er/probe.zip"])
def test_saved_probe_loads_as_it_was(tmp_path, name):
    probe = Probe.from_pairs(pairs(4), max_text_tokens=77)
    path = probe.save(tmp_path / name)
    assert Probe.load(path) == probe
    assert Probe.load(path).fingerprint == probe.fingerprint
    probe.save(path)  # a probe may be replaced
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_probe_says_whether_its_texts_belong_to_its_images(folders, tmp_path):
    matched = Probe.from_pairs(pairs(2), matched=True)
    plain = Probe.from_pairs(pairs(2))
    assert (matched.matched, plain.matched, Probe.from_folders(*folders, num_samples=2).matched) == (True, False, False)
    assert matched.fingerprint == plain.fingerprint  # MIR is the same
    file = matched.save(tmp_path / "probe") / "probe.json"
    assert Probe.load(file.parent).matched
    stored = json.loads(file.read_text())
    for value, expected in (("yes", None), (None, False)):
        stored["matched"] = value
        file.write_text(json.dumps({name: each for name, each in stored.items() if each is not None}))
        if expected is None:
            with pytest.raises(ProbeError, match="'yes'"):
                Probe.load(file.parent)
        else:  # a file of an older version
            assert Probe.load(file.parent) == plain
    with pytest.raises(ConfigError, match="matched .*1"):
        Probe.from_pairs(pairs(2), matched=1)


def test_saved_file_is_the_same_byte_for_byte_and_its_images_open(tmp_path):
    probe = Probe.from_pairs(pairs(2))
    first, second = probe.save(tmp_path / "a.zip"), probe.save(tmp_path / "b.zip")
    assert first.read_bytes() == second.read_bytes()
    folder = probe.save(tmp_path / "folder")
    assert sorted(path.suffix for path in (folder / "images").iterdir()) == [".png", ".png"]


def test_an_unpacked_zip_is_a_probe_folder(tmp_path):
    probe = Probe.from_pairs(pairs(2))
    with zipfile.ZipFile(probe.save(tmp_path / "a.zip")) as archive:
        archive.extractall(tmp_path / "unpacked")
    assert Probe.load(tmp_path / "unpacked") == probe


def test_save_refuses_to_replace_what_is_no_probe(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious").write_text("x")
    with pytest.raises(ProbeError, match="overwrite .*data"):
        Probe.from_pairs(pairs(1)).save(tmp_path / "data")
    assert (tmp_path / "data" / "precious").read_text() == "x"


def test_load_refuses_an_edited_probe(tmp_path):
    folder = Probe.from_pairs(pairs(2)).save(tmp_path / "probe")
    manifest = json.loads((folder / "probe.json").read_text())
    manifest["samples"][0]["text"] += " edited"
    (folder / "probe.json").write_text(json.dumps(manifest))
    with pytest.raises(ProbeError, match=manifest["fingerprint"]):
        Probe.load(folder)


@pytest.mark.parametrize("damage", ["missing", "manifest", "image", "version", "escape", "not a zip", "truncated"])
def test_load_says_what_is_wrong_with_a_damaged_probe(tmp_path, damage):
    path = Probe.from_pairs(pairs(2)).save(tmp_path / ("probe" if damage != "truncated" else "probe.zip"))
    if damage == "missing":
        path = tmp_path / "nowhere"
    elif damage == "manifest":
        (path / "probe.json").write_text("{")
    elif damage == "image":
        (path / "images" / "00001.png").unlink()
    elif damage == "not a zip":
        path = tmp_path / "text.zip"
        path.write_text("hello")
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        manifest = json.loads((path / "probe.json").read_text())
        if damage == "version":
            manifest["version"] = 99
        else:
            manifest["samples"][0]["image"] = "images/../../secret"
        (path / "probe.json").write_text(json.dumps(manifest))
    with pytest.raises(ProbeError, match=re.escape(str(path))):
        Probe.load(path)


def test_llava_json_gives_text_of_turns_without_placeholder(tmp_path):
    json_file, images = write_llava_json(tmp_path, 6)
    probe = Probe.from_llava_json(json_file, images, num_samples=6)
    assert probe.matched
    texts = sorted(sample.text for sample in probe.samples)
    assert texts[2] == "Describe the image concisely.\nScene 2."
    assert {sample.name for sample in probe.samples} == {f"record {i} of data.json" for i in range(6)}


def test_llava_json_skips_records_without_one_image(tmp_path):
    json_file, images = write_llava_json(tmp_path, 6)
    records = json.loads(json_file.read_text())
    del records[0]["image"]
    records[1]["image"] = [records[1]["image"], records[2]["image"]]
    records[2]["image"] = [records[2]["image"]]
    json_file.write_text(json.dumps(records))
    assert len(Probe.from_llava_json(json_file, images, num_samples=4)) == 4
    with pytest.raises(ProbeError, match="num_samples=5.* 4 "):
        Probe.from_llava_json(json_file, images, num_samples=5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "data.json as JSON: JSONDecodeError"),
        ("{}", "data.json is a JSON dict"),
        ("[3]", "record 0 of data.json has no conversations"),
        ('[{"id": "a", "image": "x.png"}]', "record a of data.json has no conversations"),
        ('[{"id": "a", "image": "x.png", "conversations": [{"value": "hi"}]}]', "record a of data.json from .*x.png"),
    ],
)
def test_llava_json_errors_name_file_and_record(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(ProbeError, match=message):
        Probe.from_llava_json(path, tmp_path, num_samples=1)


def test_story_files_end_before_their_highlights(tmp_path):
    images, _ = write_folders(tmp_path, 1)
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "a.story").write_text("An article.\n\n@highlight\n\nA summary\n")
    probe = Probe.from_folders(images, tmp_path / "stories", num_samples=1)
    assert probe.samples[0].text == "An article."


def test_error_names_folder_when_it_is_missing_or_empty(folders, tmp_path):
    images, texts = folders
    (tmp_path / "void").mkdir()
    with pytest.raises(ProbeError, match=r"nowhere \(images\)"):
        Probe.from_folders(tmp_path / "nowhere", texts)
    with pytest.raises(ProbeError, match=r"void \(texts\) has no files .*\.story"):
        Probe.from_folders(images, tmp_path / "void", num_samples=3)


def test_error_says_how_many_there_are_when_fewer_samples_than_asked(folders):
    with pytest.raises(ProbeError, match="num_samples=13.* 12 "):
        Probe.from_folders(*folders, num_samples=13)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_error_names_the_file_when_an_image_cannot_be_read(folders, damage):
    images, texts = folders
    victim = images / "part0" / "004.png"
    content = {"truncated": victim.read_bytes()[:-3000], "garbage": b"hello", "empty": b""}[damage]
    victim.write_bytes(content)
    with pytest.raises(ProbeError, match=r"part0/004\.png"):
        Probe.from_folders(images, texts, num_samples=12)


@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None], ids=["limit of Pillow", "no limit of Pillow"])
def test_error_names_an_image_that_is_too_large_with_size_and_limit(folders, monkeypatch, limit):
    images, texts = folders
    Image.new("1", (14000, 14000)).save(images / "part0" / "004.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # training code that lifts it is common
    with pytest.raises(ProbeError, match=r"part0/004\.png.* too large.*196000000 pixels") as caught:
        Probe.from_folders(images, texts, num_samples=12)
    assert "89478485" in str(caught.value)


def test_error_when_an_image_has_more_shades_than_it_would_keep(folders):
    images, texts = folders
    Image.fromarray(np.full((8, 8), 3000, dtype=np.uint16)).save(images / "part0" / "004.png")
    with pytest.raises(ProbeError, match=r"004\.png.* mode I;16"):
        Probe.from_folders(images, texts, num_samples=12)


def test_a_byte_order_mark_is_no_text(folders, tmp_path):
    images, texts = folders
    for path in texts.rglob("*.txt"):
        path.write_text("words", encoding="utf-8-sig")
    assert Probe.from_folders(images, texts, num_samples=1).samples[0].text == "words"


def test_linked_folders_are_searched(folders, tmp_path):
    images, texts = folders
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "there").symlink_to(texts)
    probe = Probe.from_folders(images, tmp_path / "linked", num_samples=12)
    assert probe.fingerprint == Probe.from_folders(images, texts, num_samples=12).fingerprint


PICTURE = Image.new("RGB", (4, 4))


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("a.png", "text"), r"image of pair 1 is a str, .*'a\.png'.* PIL\.Image\.open"),
        ((PICTURE, None), "text of pair 1 is a NoneType"),
        ((PICTURE, "text", 3), r"pair 1 is a tuple with 3 items.* \(image, text\)"),
        ((PICTURE,), "pair 1 is a tuple with 1 items"),
        ("ab", r"pair 1 is a str\..* \(image, text\)"),
        (None, "pair 1 is a NoneType"),
    ],
)
def test_error_names_what_is_wrong_with_a_pair(pair, message):
    with pytest.raises(ProbeError, match=message):
        Probe.from_pairs([(PICTURE, "text"), pair])


def test_error_names_the_pair_whose_image_is_damaged_or_would_lose_its_shades(tmp_path):
    path = tmp_path / "cut.png"
    pairs(1)[0][0].save(path)
    path.write_bytes(path.read_bytes()[:-300])
    for image, reason in ((Image.open(path), "OSError"), (Image.new("I;16", (4, 4)), "ValueError: mode I;16")):
        with pytest.raises(ProbeError, match=f"image of pair 1: {reason}"):
            Probe.from_pairs([(PICTURE, "text"), (image, "text")])


@pytest.mark.parametrize("call", [Probe.load, Probe.from_pairs(pairs(1)).save])
def test_error_when_a_path_is_none(call):
    with pytest.raises(ProbeError, match="path .* 3 of type int"):
        call(3)


@pytest.mark.parametrize("content", [b"", b" \n\t ", b"\xff\xfe\xfa"])
def test_error_names_the_file_when_a_text_is_empty_or_not_utf8(folders, content):
    images, texts = folders
    (texts / "part1" / "003.txt").write_bytes(content)
    with pytest.raises(ProbeError, match=r"003\.txt"):
        Probe.from_folders(images, texts, num_samples=12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples .* 0"),
        ({"num_samples": 2.5}, "num_samples"),
        ({"num_samples": True}, "num_samples"),
        ({"seed": "a"}, "seed .*'a'"),
        ({"num_samples": 2, "max_text_tokens": 0}, "max_text_tokens .* 0"),
    ],
)
def test_error_names_an_invalid_option_and_its_value(folders, options, message):
    with pytest.raises(ConfigError, match=message):
        Probe.from_folders(*folders, **options)


def test_error_when_a_probe_has_no_samples():
    with pytest.raises(ProbeError, match="no samples"):
        Probe(())


def test_a_probe_of_files_whose_names_are_no_text_is_saved_and_loads(tmp_path):
    for index, (image, text) in enumerate(pairs(2)):
        with (tmp_path / os.fsdecode(b"ol\xe9%d.png" % index)).open("wb") as file:
            image.save(file, "PNG")
        (tmp_path / f"{index}.txt").write_text(text)
    probe = Probe.from_folders(tmp_path, tmp_path, num_samples=2)
    probe.save(tmp_path / "probe.zip")
    loaded = Probe.load(tmp_path / "probe.zip")
    assert [sample.name for sample in loaded.samples] == [sample.name for sample in probe.samples]
    assert "\udce9" in loaded.samples[0].name
