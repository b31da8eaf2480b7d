# SPDX-License-Identifier: Apache-2.0
"""Images as tokens of the vocabulary, whose ids the model's configuration does not name."""

import numpy as np
import pytest
import torch
from transformers import BatchFeature, LlamaConfig, LlamaForCausalLM

from mir_callback import Probe, evaluate_mir
from mir_callback.errors import ConfigError, UnsupportedModelError
from tests import tiny_models
from tests.reference import rate
from tests.samples import pairs

CODES = 16


class CodeProcessor:
    """Writes an image as the brightness of its four quarters, each a token."""

    image_token = "<image>"

    def __init__(self):
        self.tokenizer = tiny_models.tokenizer({"image_token": "<image>"}, [f"<vq{code}>" for code in range(CODES)])
        self.image_processor = self._codes

    def _codes(self, image):
        pixels = np.asarray(image).mean(axis=2)
        halves = [half for part in np.array_split(pixels, 2) for half in np.array_split(part, 2, axis=1)]
        return "".join(f"<vq{int(half.mean()) % CODES}>" for half in halves)

    def __call__(self, *, text, images=None, padding=False, return_tensors=None, **options):
        for own in images or ():
            for image in own:
                first = next(at for at, each in enumerate(text) if "<image>" in each)
                text = [*text[:first], text[first].replace("<image>", self._codes(image), 1), *text[first + 1 :]]
        return BatchFeature(dict(self.tokenizer(text, padding=padding, return_tensors=return_tensors, **options)))


@pytest.fixture(scope="module")
def model_and_processor():
    torch.manual_seed(0)
    processor = CodeProcessor()
    return LlamaForCausalLM(LlamaConfig(**tiny_models.sizes(processor.tokenizer))), processor


@torch.no_grad()
def test_their_ids_are_vision(model_and_processor):
    model, processor = model_and_processor
    first, last = (processor.tokenizer.convert_tokens_to_ids(f"<vq{code}>") for code in (0, CODES - 1))
    report = evaluate_mir(
        model, Probe.from_pairs(pairs(5)), processor=processor, batch_size=2, vision_ids=f"{first}-{last}"
    )
    assert report.vision_ids == f"{first}-{last}"
    vision, text = [], []
    for image, words in pairs(5):
        inputs = processor(images=[[image]], text=["<image>" + words], return_tensors="pt")
        states = model.eval()(**inputs, output_hidden_states=True).hidden_states[1:]
        seen = (inputs["input_ids"][0] >= first) & (inputs["input_ids"][0] <= last)
        vision.append([state[0, seen] for state in states])
        text.append([state[0, ~seen] for state in states])
    assert report.mir == pytest.approx(
        rate(*([torch.cat(layer) for layer in zip(*rows, strict=True)] for rows in (vision, text)))[0], abs=1e-5
    )


def test_ids_that_do_not_occur_are_named_as_ranges_and_a_model_without_any_says_how_to_name_them(model_and_processor):
    model, processor = model_and_processor
    with pytest.raises(ConfigError, match=r"image tokens \(5000-6000\)"):
        evaluate_mir(model, Probe.from_pairs(pairs(2)), processor=processor, vision_ids="5000-6000")
    with pytest.raises(UnsupportedModelError, match="vision_ids='4-8195'"):
        evaluate_mir(model, Probe.from_pairs(pairs(2)), processor=processor)
