# SPDX-License-Identifier: Apache-2.0
"""Samples from LLaVA's JSON and from datasets with several images, videos, or `messages`."""

import json

import datasets
import pytest
from PIL import Image

from mir_callback import Probe
from mir_callback.errors import ConfigError, ProbeError
from mir_callback.probe.conversations import place
from mir_callback.probe.sample import Picture
from tests.samples import pairs

COLOURS = [(10 * index, 0, 0) for index in range(12)]


def shades(sample):
    """Its parts, with the red of images instead of them."""
    found = []
    for part in sample.open_parts():
        if isinstance(part, list):
            found.append([frame.getpixel((0, 0))[0] // 10 for frame in part])
        else:
            found.append(part if isinstance(part, str) else part.getpixel((0, 0))[0] // 10)
    return found


@pytest.fixture
def images(tmp_path):
    (tmp_path / "clip").mkdir()
    for index, colour in enumerate(COLOURS):
        image = Image.new("RGB", (8, 6), colour)
        image.save(tmp_path / f"{index}.png")
        image.save(tmp_path / "clip" / f"frame_{index}.png")  # 10 comes after 9
    (tmp_path / "clip" / "notes.txt").write_text("no frame")
    return tmp_path


def probe_of(images, *records, **options):
    path = images / "data.json"
    path.write_text(json.dumps([{"id": f"{i}", **record} for i, record in enumerate(records)]))
    return Probe.from_llava_json(path, images, num_samples=len(records), **options)


def turns(*values):
    return {"conversations": [{"from": "human" if i % 2 == 0 else "gpt", "value": v} for i, v in enumerate(values)]}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            {"image": ["3.png", "5.png"], **turns("Compare <image>\nwith <image>", "same")},
            ["Compare ", 3, "\nwith ", 5, "\nsame"],
        ),
        ({"image": ["3.png", "5.png"], **turns("<image><image> Compare", "same")}, [3, 5, " Compare\nsame"]),
        ({"image": ["3.png", "5.png"], **turns("Compare", "same")}, [3, 5, "Compare\nsame"]),
        ({"image": ["3.png"], **turns("What is <image>?", "red")}, [3, "What is ?\nred"]),
        ({"image": "3.png", **turns("<image>\nWhat?", "red")}, [3, "What?\nred"]),
        ({"video": "clip", **turns("<video>\nWhat?", "red")}, [[0, 4, 7, 11], "\nWhat?\nred"]),
        ({"video": ["clip"], "image": "3.png", **turns("a <image> b <video>")}, ["a ", 3, " b ", [0, 4, 7, 11]]),
        (turns("no image", "true"), ["no image\ntrue"]),
    ],
)
def test_images_and_videos_stand_where_the_marks_are(images, record, expected):
    anchor = {"image": "1.png", **turns("<image>", "anchor")}  # one sample needs an image
    probe = probe_of(images, record, anchor, layouts="all", video_frames=4)
    (sample,) = (each for each in probe.samples if each.name.startswith("record 0"))
    assert shades(sample) == expected
    assert probe.matched


@pytest.mark.parametrize(
    ("layouts", "kept"), [("pairs", {"1"}), ("images", {"0", "1", "2"}), ("all", {"0", "1", "2", "3"})]
)
def test_layouts_say_which_records_are_drawn(images, layouts, kept):
    records = [
        {"id": "0", "image": ["1.png", "2.png"], **turns("<image> <image> a")},
        {"id": "1", "image": "1.png", **turns("a")},
        {"id": "2", "video": "clip", **turns("a")},
        {"id": "3", **turns("a")},
    ]
    path = images / "data.json"
    path.write_text(json.dumps(records))
    probe = Probe.from_llava_json(path, images, num_samples=len(kept), layouts=layouts)
    assert {sample.name.split()[1] for sample in probe.samples} == kept
    more = f"leaves out {4 - len(kept)} more" if layouts != "all" else "4 usable"
    with pytest.raises(ProbeError, match=f"num_samples=9.* {len(kept)} usable.*{more}|{more}"):
        Probe.from_llava_json(path, images, num_samples=9, layouts=layouts)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"image": ["1.png", "2.png"], **turns("<image> a")}, "record 0 of data.json has 1 <image> and 2 images"),
        (turns("<image> a"), "record 0 of data.json has 1 <image> and 0 images"),
        ({"video": "clip", **turns("<video><video> a")}, "has 2 <video> and 1 videos"),
        ({"image": [3, "1.png"], **turns("a")}, "image of record 0 of data.json is neither a path"),
        ({"video": {"path": "x"}, **turns("a")}, "video of record 0 of data.json is neither a path"),
        ({"video": "none.mp4", **turns("a")}, "record 0 of data.json from .*none.mp4"),
        ({"video": "notes.mp4", **turns("a")}, "video of record 0 of data.json .*ffmpeg -i notes.mp4"),
        ({"video": "empty", **turns("a")}, "video of record 0 of data.json.*empty, has no image files"),
    ],
)
def test_error_names_the_record(images, record, message):
    (images / "notes.mp4").write_bytes(b"\x00\x00\x00 ftypisom")
    (images / "empty").mkdir()
    with pytest.raises(ProbeError, match=message):
        probe_of(images, record, layouts="all")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"layouts": "every"}, "layouts .*'every'"), ({"video_frames": 0}, "video_frames .* 0")],
)
def test_error_names_an_invalid_option(images, options, message):
    with pytest.raises(ConfigError, match=message):
        probe_of(images, turns("a"), **options)


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (2, [0, 11]), (3, [0, 6, 11]), (12, [*range(12)]), (99, 12)])
def test_frames_are_spread_evenly_over_a_video(images, count, expected):
    found = shades(probe_of(images, {"video": "clip", **turns("a")}, layouts="images", video_frames=count).samples[0])
    assert found == [list(range(12)) if expected == 12 else expected, "a"]


def test_an_animated_image_is_a_video(images):
    frames = [Image.new("RGB", (8, 6), colour) for colour in COLOURS]
    frames[0].save(images / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    found = shades(probe_of(images, {"video": "moving.webp", **turns("a")}, layouts="all", video_frames=3).samples[0])
    assert found == [[0, 6, 11], "a"]


def test_a_text_keeps_all_its_words():
    pictures = [Picture(b"1"), Picture(b"2")]
    for text in ("a b <image> c <image>", "<image>\n\n<image>d", "  words only \n in two lines "):
        parts = place(text, pictures, [], "x")
        assert " ".join(part for part in parts if isinstance(part, str)).split() == text.replace("<image>", " ").split()
        assert [part for part in parts if not isinstance(part, str)] == pictures


LISTS = {"images": datasets.List(datasets.Image()), "text": datasets.Value("string")}


def by_row(probe):
    return {int(sample.name.removeprefix("row ")): sample for sample in probe.samples}


def test_lists_of_images_stand_where_the_text_has_them():
    texts = ["<image> one <image> two", "none of them marked", "<image>a pair", "no image"]
    dataset = datasets.Dataset.from_dict(
        {"images": [[p for p, _ in pairs(n)] for n in (2, 2, 1, 0)], "text": texts}, features=datasets.Features(LISTS)
    )
    probe = Probe.from_dataset(dataset, 3, image_column="images", layouts="images")
    found = by_row(probe)
    assert {row: sample.kinds for row, sample in found.items()} == {
        0: ("image", "text", "image", "text"),
        1: ("image", "image", "text"),
        2: ("image", "text"),
    }
    assert found[0].texts == (" one ", " two")
    for opened, image in zip(found[0].open_images(), dataset[0]["images"], strict=True):
        assert opened.tobytes() == image.convert("RGB").tobytes()
    assert len(Probe.from_dataset(dataset, 4, image_column="images", layouts="all")) == 4
    assert [*by_row(Probe.from_dataset(dataset, 1, image_column="images"))] == [2]  # pairs, unless others are asked for
    with pytest.raises(ProbeError, match="num_samples=2.* 1 usable.* 4 rows; layouts='pairs' leaves out 3"):
        Probe.from_dataset(dataset, 2, image_column="images")
    again = Probe.from_dataset(dataset, 3, image_column="images", layouts="images")
    assert again.fingerprint == probe.fingerprint
    seeds = {Probe.from_dataset(dataset, 2, s, image_column="images", layouts="images").fingerprint for s in range(9)}
    assert len(seeds) > 1


CONTENT = [
    [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
    ],
    [
        {"role": "user", "content": [{"type": "text", "text": "Compare "}, {"type": "image", "text": None}]},
        {"role": "user", "content": [{"type": "text", "text": "with"}, {"type": "image", "text": None}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Alike."}]},
    ],
]
WORDS = [
    [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A dog."}],
    [
        {"role": "user", "content": "Compare <image>"},
        {"role": "user", "content": "with<image>"},
        {"role": "assistant", "content": "Alike."},
    ],
]


@pytest.mark.parametrize("messages", [CONTENT, WORDS], ids=["content lists", "content strings"])
def test_messages_are_read_turn_by_turn(messages):
    pictures = [image for image, _ in pairs(3)]
    dataset = datasets.Dataset.from_dict({"images": [pictures[:1], pictures[1:]], "messages": messages})
    dataset = dataset.cast_column("images", datasets.List(datasets.Image()))
    found = by_row(Probe.from_dataset(dataset, 2, image_column="images", text_column="messages", layouts="images"))
    assert [part for part in found[0].parts if isinstance(part, str)] == ["What is it?\nA dog."]
    assert found[0].is_pair
    assert found[1].kinds == ("text", "image", "text", "image", "text")
    assert [text.strip() for text in found[1].texts] == ["Compare", "with", "Alike."]


def test_images_within_messages_are_read_where_they_stand(images):
    def turn(*numbers):
        items = [{"type": "image", "image": f"file://{images / f'{number}.png'}"} for number in numbers]
        return [{"role": "user", "content": [*items, {"type": "text", "text": "Which is it?"}]}]

    dataset = datasets.Dataset.from_dict({"messages": [turn(1, 2), turn(3)]})
    options = {"text_column": "messages", "layouts": "images"}
    for given in ({}, {"image_column": None}):
        found = by_row(Probe.from_dataset(dataset, 2, **given, **options))
        assert [shades(found[row]) for row in (0, 1)] == [[1, 2, "Which is it?"], [3, "Which is it?"]]
    twice = datasets.Dataset.from_dict({"images": [[str(images / "1.png")]], "messages": [turn(1)]})
    with pytest.raises(ProbeError, match="row 0 has images in 'images' and in its turns"):
        Probe.from_dataset(twice, 1, image_column="images", **options)
    far = [{"role": "user", "content": [{"type": "image", "url": "https://x/y.png"}, {"type": "text", "text": "a"}]}]
    with pytest.raises(ProbeError, match=r"row 0 is 'https://x/y.png': nothing is downloaded"):
        Probe.from_dataset(datasets.Dataset.from_dict({"messages": [far]}), 1, **options)


def test_what_a_draw_leaves_out_is_said(images, caplog):
    with caplog.at_level("INFO", "mir_callback"):
        probe_of(images, {"image": "0.png", **turns("a")}, layouts="pairs")
        assert not caplog.messages
        records = [{"image": "0.png", **turns("a")}, turns("alone")]
        (images / "more.json").write_text(json.dumps(records))
        Probe.from_llava_json(images / "more.json", images, num_samples=1)
        assert "layouts='pairs' leaves out 1 more" in caplog.messages[0]
        rows = datasets.Dataset.from_dict({"images": [[], [str(images / "0.png")]], "text": ["alone", "a"]})
        for seed in range(5):
            Probe.from_dataset(rows, 1, seed, image_column="images")
    assert 1 < len(caplog.messages) < 6
    assert "layouts='pairs' leaves out 1 more of the rows looked at" in caplog.messages[1]


def test_llavas_conversations_with_a_single_image_column_are_read_too():
    dataset = datasets.Dataset.from_dict(
        {"image": [image for image, _ in pairs(2)], "conversations": [turns("<image>\na", "b")["conversations"]] * 2}
    ).cast_column("image", datasets.Image())
    probe = Probe.from_dataset(dataset, 2, text_column="conversations")
    assert {sample.text for sample in probe.samples} == {"a\nb"}


def test_videos_of_datasets_are_paths_or_frames(images):
    frames = [str(images / f"{index}.png") for index in range(5)]
    for videos in ([str(images / "clip")], [[str(images / "clip")]], [[frames]]):
        dataset = datasets.Dataset.from_dict({"videos": videos, "text": ["<video> seen"]})
        options = {"image_column": None, "video_column": "videos", "layouts": "images", "video_frames": 2}
        (sample,) = Probe.from_dataset(dataset, 1, **options).samples
        assert shades(sample) == [[0, 4 if videos == [[frames]] else 11], " seen"]
    stored = datasets.Dataset.from_dict(
        {"videos": [frames], "text": ["seen"]},
        features=datasets.Features({"videos": datasets.List(datasets.Image()), "text": datasets.Value("string")}),
    )
    assert shades(Probe.from_dataset(stored, 1, **options).samples[0]) == [[0, 4], "seen"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([[{"role": "user", "content": [{"type": "audio"}]}]], "row 0 has .*audio"),
        ([[{"role": "user", "content": "<image><image>"}]], "row 0 has 2 <image> and 1 images"),
        ([[1, 2]], "text_column='text' .* row 0 is a list"),
    ],
)
def test_error_names_the_row(text, message):
    dataset = datasets.Dataset.from_dict({"images": [[pairs(1)[0][0]]], "text": text})
    dataset = dataset.cast_column("images", datasets.List(datasets.Image()))
    with pytest.raises(ProbeError, match=message):
        Probe.from_dataset(dataset, 1, image_column="images", layouts="all")


def test_texts_from_elsewhere_need_one_image_each(images):
    dataset = datasets.Dataset.from_dict({"images": [[pairs(1)[0][0]]], "text": ["a"]})
    dataset = dataset.cast_column("images", datasets.List(datasets.Image()))
    with pytest.raises(ConfigError, match="texts= .*image_column"):
        Probe.from_dataset(dataset, 1, image_column="images", texts=images, layouts="images")
    with pytest.raises(ProbeError, match="image_column='images' is a column of type List"):
        Probe.from_dataset(dataset, 1, image_column="images", texts=images)
