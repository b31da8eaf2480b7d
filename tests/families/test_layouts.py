# SPDX-License-Identifier: Apache-2.0
"""Several images, images among texts, videos and texts alone, in families of different kinds, against a reference."""

from itertools import groupby

import numpy as np
import pytest
import torch
from PIL import Image

from mir_callback import Probe, evaluate_mir
from mir_callback.errors import ProbeError
from mir_callback.probe.adapters import HuggingFaceAdapter
from tests.families.registry import families
from tests.layouts import documents
from tests.reference import rate
from tests.samples import pairs

BY_NAME = {family.name: family for family in families()}
# What stands for a video, in the families' own prompts.
VIDEO = {
    "qwen3_vl_moe": "<|video_pad|>",
    "llava_onevision": "<video>",
    "internvl (video)": "<video>",
}
IMAGES = ("qwen3_vl", "llava_onevision", "idefics3", "internvl", "gemma3")


def build(family):
    """Model and processor, with the video part that LLaVA-OneVision's entry leaves out, as it needs torchvision."""
    model, processor = family.build()
    if family.name == "llava_onevision":
        from transformers import LlavaOnevisionVideoProcessor

        processor.video_processor = LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32})
    return model, processor


def frames(image):
    """Four frames of a video, each a little darker."""
    return [Image.fromarray((np.asarray(image) * share).astype(np.uint8)) for share in (1.0, 0.9, 0.8, 0.7)]


@torch.no_grad()
def expected(family, samples, *, all_text=False):
    """MIR of samples of any layout, one at a time, from the hidden states that the model itself returns."""
    model, processor = build(family)
    model.eval()
    marks = {"image": family.prompt.replace("{text}", ""), "video": VIDEO.get(family.name)}
    ids = {getattr(model.config, name, None) for name in ("image_token_id", "video_token_id")} - {None}
    vision, text = [], []
    for sample in samples:
        kinds = ["text" if isinstance(each, str) else "video" if isinstance(each, list) else "image" for each in sample]
        prompt = "".join(each if kind == "text" else marks[kind] for kind, each in zip(kinds, sample, strict=True))
        images = [each for kind, each in zip(kinds, sample, strict=True) if kind == "image"]
        videos = [
            np.stack(list(map(np.asarray, each))) for kind, each in zip(kinds, sample, strict=True) if kind == "video"
        ]
        given = {"images": [images]} if images else {}
        given |= {"videos": [videos], "do_sample_frames": False} if videos else {}
        inputs = processor(text=[prompt], return_tensors="pt", **given)
        states = model(**inputs, output_hidden_states=True).hidden_states[1:]
        row = inputs["input_ids"][0].tolist()
        seen = torch.tensor([each in ids for each in row])
        special = [each in processor.tokenizer.all_special_ids for each in row]
        begin = len(next((list(group) for key, group in groupby(special) if key), [])) if special[0] else 0
        last = max((at for at, each in enumerate(seen.tolist()) if each), default=-1)
        counts = torch.arange(len(row)) >= begin if all_text or last < 0 else torch.arange(len(row)) > last
        vision.append([state[0, seen] for state in states])
        text.append([state[0, counts & ~seen] for state in states])
    return rate(*([torch.cat(layer) for layer in zip(*rows, strict=True)] for rows in (vision, text)))[0]


def measured(family, samples, **options):
    model, processor = build(family)
    return evaluate_mir(model, Probe.from_samples(samples), processor=processor, batch_size=2, **options).mir


@pytest.mark.families
@pytest.mark.parametrize("text_positions", ["after_image", "all"])
@pytest.mark.parametrize("name", IMAGES)
def test_images_among_texts(name, text_positions):
    family = BY_NAME[name]
    value = measured(family, documents(), text_positions=text_positions)
    assert value == pytest.approx(expected(family, documents(), all_text=text_positions == "all"), abs=1e-5)


@pytest.mark.families
@pytest.mark.parametrize("name", IMAGES)
def test_texts_alone_count_if_asked_to(name):
    family, samples = BY_NAME[name], [*documents(), *([text + " alone"] for _, text in pairs(2))]
    assert measured(family, samples, text_only="count") == pytest.approx(expected(family, samples), abs=1e-5)
    assert measured(family, samples) == pytest.approx(expected(family, documents()), abs=1e-5)


@pytest.mark.families
@pytest.mark.parametrize("name", VIDEO)
def test_videos(name):
    family = BY_NAME[name]
    samples = [[frames(image), text] for image, text in pairs(3)]
    assert measured(family, samples) == pytest.approx(expected(family, samples), abs=1e-5)


@pytest.mark.families
def test_a_video_is_refused_by_a_family_without_any():
    samples = [[frames(image), text] for image, text in pairs(2)]
    with pytest.raises(ProbeError, match="1 video, then 1 text, and the model takes no video"):
        measured(BY_NAME["llava"], samples)


@pytest.mark.families
@pytest.mark.parametrize("name", ["blip-2", "kosmos-2", "instructblip", "paligemma"])
def test_a_family_that_needs_an_image_in_every_sample_says_so_before_its_first_forward(name):
    model, processor = build(BY_NAME[name])
    probe = Probe.from_samples([*([image, text] for image, text in pairs(2)), ["a text alone"]])
    model.register_forward_pre_hook(lambda *_: pytest.fail("a forward"))
    with pytest.raises(ProbeError, match="text_only='leave_out'"):
        evaluate_mir(model, probe, processor=processor, text_only="count")


@pytest.mark.families
def test_an_image_that_is_cut_off_is_named():
    model, processor = build(BY_NAME["qwen3_vl"])
    adapter = HuggingFaceAdapter(model, processor)
    end = processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")
    whole = type(processor).__call__

    def cut(self, *given, **named):
        found = whole(self, *given, **named)
        found["input_ids"][found["input_ids"] == end] = 5
        return found

    type(processor).__call__ = cut
    try:
        with pytest.raises(ProbeError, match="1 images and 0 of their '<|vision_end|>'"):
            adapter.encode(Probe.from_pairs(pairs(1)).samples, 100)
    finally:
        type(processor).__call__ = whole
