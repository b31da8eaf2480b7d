# SPDX-License-Identifier: Apache-2.0
"""Probes of other samples than image + text pairs: building, fingerprint, saving, limits, and what pairs keep."""

import io
import json
import struct
import zipfile
import zlib
from itertools import permutations

import pytest
from PIL import Image

from mir_callback import Probe
from mir_callback.errors import ProbeError
from mir_callback.probe import sample as sample_module
from mir_callback.probe import storage
from mir_callback.probe.sample import MAX_PIXELS, Picture, Sample, Video
from tests.layouts import mixed
from tests.samples import pairs

RED, BLUE = (Image.new("RGB", (8, 6), colour) for colour in ("red", "blue"))
VIDEO = [RED, BLUE, RED]


def file_of(image, format_="BMP"):
    buffer = io.BytesIO()
    image.save(buffer, format_)
    return buffer.getvalue()


@pytest.fixture
def probe():
    return Probe.from_samples([["a", RED, "b", BLUE], [VIDEO, "seen"], ["only a text"], [BLUE, "a pair"]])


def test_a_probe_of_pairs_has_the_fingerprint_it_always_had(tmp_path):
    bitmap = file_of(Image.new("RGB", (2, 2), (10, 20, 30)))
    samples = (Sample.pair("a", bitmap, "one text"), Sample.pair("b", bitmap, "another"))
    probe = Probe(samples, max_text_tokens=77)
    assert probe.fingerprint == "1d4e3b70a9c5a422"
    stored = json.loads((probe.save(tmp_path / "probe") / "probe.json").read_text())
    assert stored["version"] == 1
    assert stored["samples"][1] == {"name": "b", "image": "images/00001.bmp", "text": "another"}


def test_a_pair_is_the_same_from_pairs_and_from_samples():
    by_samples, by_pairs = Probe.from_samples(pairs(3)), Probe.from_pairs(pairs(3))
    assert by_samples.fingerprint == by_pairs.fingerprint
    assert [each.parts for each in by_samples.samples] == [each.parts for each in by_pairs.samples]


def test_fingerprint_depends_on_order_and_kind_of_all_parts():
    variants = [[list(parts)] for parts in permutations(["a", "b", RED, VIDEO])]
    variants += [[["a", RED]], [["a"], [RED, "a"]], [["a", RED], ["a"]], [[[RED], "a"]], [[RED, "a", "a"]]]
    variants += [[[RED, "aa", "b"]], [[RED, "a", "ab"]], [[[RED, RED], "a"]], [[[RED], [RED], "a"]], [[RED, RED, "a"]]]
    variants += [[[RED, "a"], ["b"]], [[RED, "a", "b"]], [[RED, "a"], [RED, "b", "a"]], [[RED, "a", RED, "b"], ["a"]]]
    found = [Probe.from_samples(variant).fingerprint for variant in variants]
    assert len({*found}) == len(found)


@pytest.mark.parametrize("name", ["probe.zip", "probe"])
def test_a_saved_probe_of_any_layout_loads_as_it_was(probe, tmp_path, name):
    path = probe.save(tmp_path / name)
    loaded = Probe.load(path)
    assert (loaded, loaded.fingerprint) == (probe, probe.fingerprint)
    assert [each.kinds for each in loaded.samples][:2] == [("text", "image", "text", "image"), ("video", "text")]
    probe.save(path)  # it may be replaced
    manifest = storage._MANIFEST
    text = (path / manifest).read_text() if path.is_dir() else zipfile.ZipFile(path).read(manifest).decode()
    assert json.loads(text)["version"] == 2  # which older versions refuse by its number


def test_parts_open_in_their_order(probe):
    first, second, third, _ = (sample.open_parts() for sample in probe.samples)
    assert [part if isinstance(part, str) else part.getpixel((0, 0)) for part in first] == [
        *("a", (255, 0, 0), "b", (0, 0, 255))
    ]
    assert [frame.getpixel((0, 0))[2] for frame in second[0]] == [0, 255, 0]
    assert third == ["only a text"]
    assert [len(list(sample.open_images())) for sample in probe.samples] == [2, 3, 0, 1]


@pytest.mark.parametrize(
    ("index", "words"), [(0, "2 images and 2 texts"), (1, "1 video, then 1 text"), (2, "1 text"), (3, None)]
)
def test_what_is_no_pair_is_refused_by_name_with_what_it_holds(probe, index, words):
    sample = probe.samples[index]
    assert sample.is_pair == (words is None)
    if words is None:
        assert (sample.text, sample.open_image().size) == ("a pair", BLUE.size)
        return
    for read in (lambda: sample.text, sample.open_image):
        with pytest.raises(ProbeError, match=f"sample {index} holds {words}; this adapter takes one image"):
            read()


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([[RED, "a"], "ab"], "sample 1 is a str"),
        ([[RED, "a"], [RED, 3]], "Part 2 of sample 1 is a int"),
        ([[RED, "a", [RED, "b"]]], "rame 2 of part 3 of sample 0 is a str"),
        ([[RED, RED]], "text of sample 0 is empty"),
        ([[RED, "a"], [RED, " ", "\n"]], "text of sample 1 is empty"),
        ([[RED, "a"], []], "text of sample 1 is empty"),
        ([["a"], ["b"]], "No sample of the probe has an image"),
        ([[[], "a"]], "video of sample 0"),
        ([["a", [RED], [RED, RED.resize((9, 9))]]], "frames of video 2 of sample 0 .* 8 x 6, 9 x 9"),
        ([["a", RED, Image.new("I;16", (4, 4))]], "part 3 of sample 0: ValueError: mode I;16"),
    ],
)
def test_error_names_what_is_wrong_with_a_sample(samples, message):
    with pytest.raises(ProbeError, match=message):
        Probe.from_samples(samples)


@pytest.mark.parametrize("parts", ["text", ("a", 3), ("a", b"bytes"), 7])
def test_a_sample_of_other_parts_is_refused(parts):
    with pytest.raises(ProbeError, match="of mine"):
        Sample("mine", parts)


def huge():
    """A file of a few bytes whose header declares more pixels than are allowed."""
    content = file_of(Image.new("1", (1, 1)), "PNG")
    side = int(MAX_PIXELS**0.5) + 1
    header = b"IHDR" + struct.pack(">II", side, side) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_limits_hold_for_every_image_and_frame():
    fine, eps = file_of(RED), file_of(RED, "EPS")
    for bad, message in ((huge(), "too large"), (eps, "format is EPS"), (b"", "not a known image"), (3, "TypeError")):
        for part, name in (
            (Video((fine, bad)), "rame 2 of the video of mine"),
            (Picture(bad), "mage 2 of mine"),
        ):
            others = (Picture(fine),) if isinstance(part, Picture) else ()
            with pytest.raises(ProbeError, match=f"{name}.*{message}"):
                Probe((Sample("mine", (*others, part, "text")),))


def test_the_images_of_one_sample_are_limited_together(monkeypatch):
    monkeypatch.setattr(sample_module, "MAX_SAMPLE_PIXELS", 2 * 48)
    Probe.from_samples([[RED, BLUE, "a"], [BLUE, RED, "b"]])
    for parts in ([RED, BLUE, RED, "a"], [VIDEO, "a"]):
        with pytest.raises(ProbeError, match="sample 0 have more than 96 pixels together"):
            Probe.from_samples([parts])


@pytest.fixture
def saved(probe, tmp_path):
    with zipfile.ZipFile(probe.save(tmp_path / "honest.zip")) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"image": "images/../../secret"}, {"text": "a"}], "secret"),
        ([{"video": ["images/00000.png", "/etc/passwd"]}, {"text": "a"}], "passwd"),
        ([{"image": "images/00000.png"}, {"image": "images/00000.png"}, {"text": "a"}], "share"),
        ([{"video": ["images/00000.png"] * 1000}, {"text": "a"}], "share"),
        ([{"video": "images/00000.png"}, {"text": "a"}], "a part is"),
        ([{"image": ["images/00000.png"]}, {"text": "a"}], "a part is"),
        ([{"image": "images/00000.png", "text": "a"}], "unpack"),
        ([{"code": "print()"}], "code"),
        ([3], "AttributeError"),
        ("ab", "AttributeError"),
        ([{"image": "images/99999.png"}, {"text": "a"}], "99999"),
    ],
)
def test_a_manifest_of_odd_parts_is_refused(saved, tmp_path, parts, message):
    manifest = json.loads(saved["probe.json"])
    manifest["samples"] = [{"name": "a", "parts": parts}]
    with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
        for name, content in {**saved, "probe.json": json.dumps(manifest)}.items():
            archive.writestr(name, content)
    with pytest.raises(ProbeError, match=f"odd.zip.*{message}"):
        Probe.load(tmp_path / "odd.zip")


@pytest.mark.parametrize(("name", "limit"), [("MAX_SAMPLES", 5), ("MAX_BYTES", 300), ("MAX_INDEX_BYTES", 400)])
def test_limits_of_storage_count_every_image(probe, tmp_path, monkeypatch, name, limit):
    assert len(probe) < 5 < sum(sample.num_images for sample in probe.samples)
    probe.save(tmp_path / "before.zip")
    monkeypatch.setattr(storage, name, limit)
    with pytest.raises(ProbeError, match=f"too large.* 4 samples and 6 images.*{limit}"):
        probe.save(tmp_path / "after.zip")
    with pytest.raises(ProbeError, match=f"{limit}"):
        Probe.load(tmp_path / "before.zip")


def test_mixed_layouts_are_described():
    probe = Probe.from_samples(mixed(3))
    assert [each.describe() for each in probe.samples] == ["1 image, then 1 text", "2 images and 3 texts", "1 text"]
