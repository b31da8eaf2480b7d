# SPDX-License-Identifier: Apache-2.0
"""Where the decoder is: in transformers' configurations of any age, and where an adapter says."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mir_callback import Probe, evaluate_mir, modality_integration_rate
from mir_callback.errors import UnsupportedModelError
from mir_callback.model.decoder import decoder_at, text_config
from mir_callback.model.modality import modality_masks
from mir_callback.probe.adapters import AdaptedBatch
from tests.samples import pairs

IMAGE = 256


def test_text_part_is_found_when_the_configuration_has_no_method_for_it():
    text = SimpleNamespace(num_hidden_layers=3)
    assert text_config(SimpleNamespace(config=SimpleNamespace(text_config=text, vision_config=None))) is text
    assert text_config(SimpleNamespace(config=text)) is text


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x, start):
        return x + self.linear(x).tanh().cumsum(dim=1), {"cache": x}


class OwnVLM(nn.Module):
    """Without a configuration, as those that people write themselves: bytes, 4 tokens an image, a dict of layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.lm = nn.ModuleDict({"embed": nn.Embedding(IMAGE + 1, 16), "norm": nn.LayerNorm(16)})
        self.lm["layers"] = nn.ModuleDict({str(k): Layer() for k in range(3)})
        self.project = nn.Linear(3, 16)

    def forward(self, tokens, pixels=None):
        x = self.lm["embed"](tokens)
        if pixels is not None:
            x = x.clone()
            x[tokens == IMAGE] = self.project(pixels).flatten(0, 1)
        for layer in self.lm["layers"].values():
            x, _ = layer(x, 0)
        return self.lm["norm"](x)


class OwnAdapter:
    layers, with_pixels = "lm.layers", True

    def encode(self, samples, max_text_tokens):
        rows = [torch.tensor([IMAGE] * 4 + list(sample.text.encode()[:max_text_tokens])) for sample in samples]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        pixels = [
            torch.tensor(list(sample.open_image().resize((2, 2)).tobytes())).view(4, 3) / 255 for sample in samples
        ]
        inputs = {"tokens": tokens, "pixels": torch.stack(pixels) if self.with_pixels else None}
        return AdaptedBatch(inputs, modality_masks(tokens, tokens, (IMAGE,)), rows)

    def live_masks(self, model):
        return nullcontext()

    def decoder(self, model):
        return decoder_at(model, self.layers, embedding="lm.embed", hidden_size=16)


def test_model_of_any_kind_is_measured_where_its_adapter_says():
    model, probe, adapter = OwnVLM(), Probe.from_pairs(pairs(4), max_text_tokens=64), OwnAdapter()
    states = [[] for _ in range(3)]
    for sample in probe.samples:
        inputs = adapter.encode([sample], 64).inputs
        x = model.lm["embed"](inputs["tokens"]).clone()
        x[:, :4] = model.project(inputs["pixels"])
        for k in range(3):
            x = model.lm["layers"][str(k)](x, 0)[0]
            states[k].append(model.lm["norm"](x) if k == 2 else x)
    vision = [torch.cat([x[0, :4] for x in of_layer]).detach() for of_layer in states]
    text = [torch.cat([x[0, 4:] for x in of_layer]).detach() for of_layer in states]
    expected = modality_integration_rate(vision, text).mir
    for batch_size in (1, 4):
        found = evaluate_mir(model, probe, adapter=adapter, batch_size=batch_size)
        assert found.mir == pytest.approx(expected, abs=1e-6)


def test_refused_when_images_do_not_reach_such_a_model():
    adapter = OwnAdapter()
    adapter.with_pixels = False
    with pytest.raises(UnsupportedModelError, match="plain token embeddings"):
        evaluate_mir(OwnVLM(), Probe.from_pairs(pairs(4)), adapter=adapter)


@pytest.mark.parametrize("name", ["lm.blocks", "project"])
def test_refused_when_the_adapter_names_what_is_not_there(name):
    adapter = OwnAdapter()
    adapter.layers = name
    with pytest.raises(UnsupportedModelError, match=f"'{name}'"):
        evaluate_mir(OwnVLM(), Probe.from_pairs(pairs(4)), adapter=adapter)
