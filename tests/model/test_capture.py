# SPDX-License-Identifier: Apache-2.0
"""What hooks keep is what Hugging Face returns as hidden states, and unfit models are refused."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mir_callback import Probe
from mir_callback.errors import UnsupportedModelError
from mir_callback.evaluation.hidden_states import HiddenStateStore
from mir_callback.model.capture import HiddenStateCapture
from mir_callback.model.decoder import find_decoder
from mir_callback.model.parallelism import SampleShare
from mir_callback.probe.adapters import HuggingFaceAdapter
from mir_callback.probe.batches import encode_probe
from tests import tiny_models
from tests.samples import pairs

FAMILIES = [tiny_models.llava, tiny_models.qwen2_5_vl, tiny_models.idefics3, tiny_models.paligemma]


def batches(model, processor, count=5, batch_size=2):
    adapter = HuggingFaceAdapter(model, processor)
    probe = Probe.from_pairs(pairs(count))
    return encode_probe(probe, adapter, share=SampleShare(), batch_size=batch_size).batches


def captured(model, batches):
    """The rows of all layers that hooks hand on."""
    decoder = find_decoder(model)
    store = HiddenStateStore(range(len(decoder.layers)))
    with HiddenStateCapture(decoder, store.append) as capture:
        for batch in batches:
            capture.forward(model, batch.inputs, batch.masks, batch.keep)
    store.finish()
    return store


@pytest.mark.parametrize("build", FAMILIES)
@torch.no_grad()
def test_rows_equal_the_hidden_states_hugging_face_returns(build):
    model, processor = build()
    model.eval()
    decoder = find_decoder(model)
    assert len(decoder.layers) == tiny_models.LAYERS
    expected_vision = [[] for _ in decoder.layers]
    expected_text = [[] for _ in decoder.layers]
    store = captured(model, batches(model, processor))
    for batch in batches(model, processor):
        states = model(**batch.inputs, use_cache=False, output_hidden_states=True).hidden_states[1:]
        for layer, state in enumerate(states):
            expected_vision[layer].append(state[batch.masks.vision])
            expected_text[layer].append(state[batch.masks.text])
    for layer in range(len(decoder.layers)):
        vision, text = store.take(layer)
        assert torch.equal(vision, torch.cat(expected_vision[layer]))
        assert torch.equal(text, torch.cat(expected_text[layer]))


@torch.no_grad()
def test_the_last_layer_is_taken_after_the_final_norm():
    model, processor = tiny_models.llava()
    norm = model.model.language_model.norm
    norm.weight.fill_(2.0)
    vision, _ = captured(model.eval(), batches(model, processor)).take(tiny_models.LAYERS - 1)
    # RMS norm with weight 2: every row has root mean square 2.
    assert torch.allclose(vision.square().mean(dim=1).sqrt(), torch.tensor(2.0), atol=0.02)


@torch.no_grad()
def test_repeats_that_fill_up_a_batch_are_discarded():
    model, processor = tiny_models.llava()
    (batch,) = batches(model.eval(), processor, count=2, batch_size=2)
    vision, text = captured(model, [replace(batch, keep=torch.tensor([True, False]))]).take(0)
    assert len(vision) == int(batch.masks.vision[0].sum())
    assert len(text) == int(batch.masks.text[0].sum())


@torch.no_grad()
def test_logits_are_computed_for_one_position_only():
    model, processor = tiny_models.llava()
    shapes = []
    model.lm_head.register_forward_hook(lambda _m, _a, output: shapes.append(tuple(output.shape)))
    (batch,) = batches(model.eval(), processor, count=2, batch_size=2)
    captured(model, [batch])
    assert [shape[:2] for shape in shapes] == [(2, 1)]


@torch.no_grad()
def test_hooks_are_gone_afterwards_also_after_an_error():
    model, processor = tiny_models.llava()
    (batch,) = batches(model.eval(), processor, count=1, batch_size=1)

    def hooks():
        registered = [
            hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
        ]
        return sum(hook.__module__.startswith("mir_callback") for hook in registered)  # transformers keeps its own

    capture = HiddenStateCapture(find_decoder(model), lambda *_: None)
    broken = {**batch.inputs, "pixel_values": torch.zeros(1, 3, 5, 5)}
    with pytest.raises(Exception, match="size|shape|match"), capture:  # noqa: PT012 - the hooks exist only inside
        assert hooks() > 0
        capture.forward(model, broken, batch.masks, batch.keep)
    assert hooks() == 0


def test_wrapped_models_are_found_below_their_wrappers():
    model, _ = tiny_models.llava()

    class Engine(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    assert find_decoder(Engine(Engine(model))).model is model


def test_vision_layers_are_not_taken_for_the_decoder_when_as_many():
    model, _ = tiny_models.llava()
    assert len(model.model.vision_tower.encoder.layers) == tiny_models.LAYERS
    assert find_decoder(model).layers == tuple(model.model.language_model.layers)


def test_error_when_there_is_no_such_layer_list():
    model, _ = tiny_models.llava()
    model.config.text_config.num_hidden_layers = 7
    with pytest.raises(UnsupportedModelError, match="ModuleList of 7 decoder layers"):
        find_decoder(model)
    with pytest.raises(UnsupportedModelError, match="Linear has no Hugging Face config"):
        find_decoder(nn.Linear(2, 2))


@torch.no_grad()
def run(model, processor):
    (batch,) = batches(model.eval(), processor, count=1, batch_size=1)
    captured(model, [batch])


def test_refused_when_images_do_not_reach_the_stream():
    model, processor = tiny_models.llava()

    def blind(input_ids, attention_mask, **_unused):
        output = model.model.language_model(input_ids=input_ids, attention_mask=attention_mask)
        output["image_hidden_states"] = None
        return output

    model.model.forward = blind  # the language model alone, pixels ignored
    with pytest.raises(UnsupportedModelError, match="vision positions have plain token embeddings"):
        run(model, processor)


def test_refused_when_a_layer_is_skipped_or_repeated():
    model, processor = tiny_models.llava()
    layers = model.model.language_model.layers
    original = layers[0].forward
    layers[0].forward = lambda state, *args, **kwargs: layers[1](original(state, *args, **kwargs), *args, **kwargs)
    with pytest.raises(UnsupportedModelError, match=r"order \[1, 0, 1, 2\]"):
        run(model, processor)


def test_refused_when_the_stream_has_another_shape_than_input_ids():
    model, processor = tiny_models.llava()
    inner = model.model.language_model
    original = inner.forward

    def prepended(inputs_embeds, **kwargs):
        kwargs |= {"attention_mask": None, "position_ids": None}
        return original(inputs_embeds=torch.cat([inputs_embeds[:, :1], inputs_embeds], dim=1), **kwargs)

    inner.forward = prepended
    with pytest.raises(UnsupportedModelError, match="its first decoder layer got"):
        run(model, processor)
