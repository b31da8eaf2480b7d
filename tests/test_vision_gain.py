# SPDX-License-Identifier: Apache-2.0
"""Vision gain: the loss on the probe's texts with other samples' images minus with the right ones."""

import dataclasses
import io
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mir_callback import Probe, evaluate_mir
from mir_callback.errors import ConfigError, ProbeError
from mir_callback.evaluation.hidden_states import GB
from mir_callback.probe.adapters import HuggingFaceAdapter
from mir_callback.probe.batches import exchange_images
from mir_callback.probe.sample import Sample
from tests import tiny_models
from tests.samples import image_of, pairs

COUNT = 7
FIELDS = ("probe_loss", "vision_gain", "vision_gain_se")


@pytest.fixture(scope="module")
def probe():
    return Probe.from_pairs(pairs(COUNT), matched=True)


def rolled(samples):
    images = [image for image, _ in samples]
    return list(zip(images[1:] + images[:1], [text for _, text in samples], strict=True))


@torch.no_grad()
def losses_by_labels(model, processor, samples):
    """Summed loss and number of predicted tokens of each sample, (n, 2), by transformers' own loss."""
    found, image_id = [], model.config.image_token_id
    before, after = (
        ("<|vision_start|>", "<|vision_end|>") if hasattr(model.config, "vision_start_token_id") else ("", "")
    )
    for image, words in samples:
        prompt = before + processor.image_token + after + words
        inputs = processor(images=[[image]], text=[prompt], return_tensors="pt")
        labels = inputs["input_ids"].clone()
        first = int((labels[0] == image_id).nonzero()[-1]) + 1
        labels[0, : first + 1] = -100
        count = int((labels[0] != -100).sum())
        found.append([model.eval()(**inputs, labels=labels).loss.item() * count, count])
    return np.array(found)


def gain_of(right, other, weights=1.0):
    """The ratio of sums over samples."""
    return float((weights * (other - right)[:, 0]).sum() / (weights * right[:, 1]).sum())


@pytest.mark.parametrize("build", [tiny_models.llava, tiny_models.qwen2_5_vl])
def test_gain_is_the_difference_of_the_models_own_losses_with_images_rolled(build, probe):
    model, processor = build()
    with torch.no_grad():  # else images hardly matter to random weights
        for name, weight in model.named_parameters():
            if "multi_modal_projector" in name or "merger" in name:
                weight *= 4.0
    right, other = (losses_by_labels(model, processor, samples) for samples in (pairs(COUNT), rolled(pairs(COUNT))))
    expected = gain_of(right, other)
    assert abs(expected) > 1e-4
    report = evaluate_mir(model, probe, processor=processor, vision_gain=True, batch_size=3)
    assert report.probe_loss == pytest.approx(right[:, 0].sum() / right[:, 1].sum(), rel=1e-6)
    assert report.vision_gain == pytest.approx(expected, abs=2e-6)
    # The influence of a sample: N times the derivative by its weight.
    step = 1e-3 * np.eye(COUNT)
    slopes = [COUNT * (gain_of(right, other, 1 + up) - gain_of(right, other, 1 - up)) / 2e-3 for up in step]
    assert report.vision_gain_influences == pytest.approx(slopes, abs=2e-5)
    jackknife = np.array([gain_of(np.delete(right, i, axis=0), np.delete(other, i, axis=0)) for i in range(COUNT)])
    error = np.sqrt((COUNT - 1) * jackknife.var())
    assert report.vision_gain_se == pytest.approx(error, rel=0.1)
    plain = evaluate_mir(model, probe, processor=processor, batch_size=3)
    assert (plain.mir, plain.influences, plain.vision_gain) == (report.mir, report.influences, None)


def test_gain_is_the_same_at_any_batch_size_in_several_passes_and_when_memory_runs_out(probe):
    model, processor = tiny_models.qwen2_5_vl()
    whole = evaluate_mir(model, probe, processor=processor, vision_gain=True, batch_size=1)
    budget = 1.5 * (whole.num_vision_tokens + whole.num_text_tokens) * tiny_models.HIDDEN * 4 / GB
    for options in ({"batch_size": 7}, {"batch_size": 3, "capture_budget_gb": budget}):
        report = evaluate_mir(model, probe, processor=processor, vision_gain=True, **options)
        for name in FIELDS:
            assert getattr(report, name) == pytest.approx(getattr(whole, name), abs=1e-6), name
    assert report.passes == 3
    calls = []

    def run_out(_model, _args, kwargs):
        calls.append(len(kwargs["input_ids"]))
        if len(calls) > 5 and calls[-1] > 2:  # in the first forward with another image
            raise torch.OutOfMemoryError("out of memory")

    with model_hook(model, run_out):
        report = evaluate_mir(model, probe, processor=processor, vision_gain=True, batch_size=4)
    assert calls == [1, 1, 2, 4, 3, 4, *[2, 2, 2, 1] * 2]
    assert report.vision_gain == pytest.approx(whole.vision_gain, abs=1e-6)


@contextmanager
def model_hook(model, hook):
    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def test_a_model_that_ignores_images_gains_nothing(probe):
    model, processor = tiny_models.llava()
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.zero_()
    report = evaluate_mir(model, probe, processor=processor, vision_gain=True)
    assert report.vision_gain == pytest.approx(0.0, abs=1e-7)
    assert report.vision_gain_se == pytest.approx(0.0, abs=1e-7)


def with_images(probe, numbers):
    return [Sample.pair(probe.samples[0].name, image_of(probe.samples[n]), f"{i}") for i, n in enumerate(numbers)]


def test_the_other_image_is_the_next_samples_if_all_differ(probe):
    samples = with_images(probe, [0, 1, 2])
    found = exchange_images(samples)
    assert [image_of(sample) for sample in found] == [image_of(sample) for sample in [*samples[1:], samples[0]]]
    assert [sample.text for sample in found] == [sample.text for sample in samples]


@given(st.lists(st.integers(0, 6), min_size=2, max_size=12))
def test_images_are_used_as_often_as_before_and_never_for_their_own_sample(probe, numbers):
    samples = with_images(probe, numbers)
    if 2 * max(map(numbers.count, numbers)) > len(numbers):
        with pytest.raises(ProbeError, match=f"of the {len(numbers)} samples"):
            exchange_images(samples)
        return
    found = exchange_images(samples)
    assert sorted(map(image_of, found)) == sorted(image_of(sample) for sample in samples)
    assert all(image_of(other) != image_of(own) for other, own in zip(found, samples, strict=True))


def test_one_picture_in_two_files_is_one_image(probe):
    bitmap = io.BytesIO()
    probe.samples[0].open_image().save(bitmap, "BMP")
    with pytest.raises(ProbeError, match="2 of the 2"):
        exchange_images([probe.samples[0], Sample.pair("bitmap", bitmap.getvalue(), "text")])


class Counting(HuggingFaceAdapter):
    """Says how wide the image is, so that the text depends on it."""

    def encode(self, samples, max_text_tokens):
        told = [Sample.pair(s.name, image_of(s), f"{s.open_image().height} {s.text}") for s in samples]
        return super().encode(told, max_text_tokens)


def test_what_has_no_gain_is_refused_before_any_forward(probe):
    model, processor = tiny_models.llava()
    same = dataclasses.replace(
        probe, samples=[Sample.pair(s.name, image_of(probe.samples[0]), s.text) for s in probe.samples]
    )
    unmatched = dataclasses.replace(probe, matched=False)
    adapter = Counting(model, processor)
    with model_hook(model, pytest.fail):
        with pytest.raises(ConfigError, match=r"from_llava_json.*from_pairs"):
            evaluate_mir(model, unmatched, processor=processor, vision_gain=True)
        with pytest.raises(ProbeError, match="7 of the 7 samples"):
            evaluate_mir(model, same, processor=processor, vision_gain=True)
        with pytest.raises(ProbeError, match="Counting gives pair 0"):
            evaluate_mir(model, probe, adapter=adapter, vision_gain=True)


class Silent(HuggingFaceAdapter):
    """Does not tell the token ids of texts, as adapters need not."""

    def encode(self, samples, max_text_tokens):
        return dataclasses.replace(super().encode(samples, max_text_tokens), text_ids=None)


@pytest.mark.parametrize("option", ["probe_loss", "vision_gain"])
def test_an_adapter_without_ids_of_texts_is_refused_before_any_forward(probe, option):
    model, processor = tiny_models.llava()
    with model_hook(model, pytest.fail), pytest.raises(ConfigError, match=f"{option} needs the token ids.*Silent"):
        evaluate_mir(model, probe, adapter=Silent(model, processor), **{option: True})
    sees_ahead, processor = tiny_models.paligemma()  # the text is a prefix, in which each token sees all others
    with model_hook(sees_ahead, pytest.fail), pytest.raises(ConfigError, match=f"{option} .*PaliGemma"):
        evaluate_mir(sees_ahead, probe, processor=processor, **{option: True})


def test_a_model_that_cuts_the_text_behind_a_larger_image_is_refused_by_name(probe):
    model, processor = tiny_models.llava()

    class Cutting(HuggingFaceAdapter):
        """Counts fewer tokens as text behind high images, as a model may that has no room for all of them."""

        def encode(self, samples, max_text_tokens):
            adapted = super().encode(samples, max_text_tokens)
            for row, sample in enumerate(samples):
                last = int(adapted.masks.text[row].nonzero()[-1])
                adapted.masks.text[row, last] &= sample.open_image().height < 56
            return adapted

    with pytest.raises(ProbeError, match="of pair 1 with its own image"):
        evaluate_mir(model, probe, adapter=Cutting(model, processor), vision_gain=True)
