# SPDX-License-Identifier: Apache-2.0
"""Compiled models: measured as they are uncompiled, trained as without MIR, and never compiled again for it."""

import copy

import pytest
import torch
from accelerate.utils import compile_regions
from transformers import LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaMLP

from mir_callback import Probe, evaluate_mir
from mir_callback.best_model import default_saver
from mir_callback.integrations.huggingface import TrainerSaver
from tests import tiny_models
from tests.distributed.launch import run_ranks
from tests.samples import pairs
from tests.training.runs import collator, make_trainer


class Backend:
    """Compiles nothing, and counts the graphs that it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def in_place(model, backend):
    model.compile(backend=backend)
    return model


def layers(model, backend):
    """The first in place, the others wrapped."""
    found = model.model.language_model.layers
    found[0].compile(backend=backend)
    for index, layer in enumerate(found[1:], start=1):
        found[index] = torch.compile(layer, backend=backend)
    return model


def parts(model, backend):
    """Also the parts that evaluations look at: embeddings, final norm, output embeddings, language model."""
    language_model = model.model.language_model
    language_model.norm = torch.compile(language_model.norm, backend=backend)
    language_model.embed_tokens = torch.compile(language_model.embed_tokens, backend=backend)
    model.lm_head = torch.compile(model.lm_head, backend=backend)
    model.model.language_model = torch.compile(language_model, backend=backend)
    return model


def function(model, backend):
    """A function that a model compiles itself, as some compile attention."""
    gate = torch.compile(lambda mlp, x: mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), backend=backend)
    for module in model.modules():
        if isinstance(module, LlamaMLP):
            module.forward = lambda x, mlp=module: mlp.down_proj(gate(mlp, x))
    return model


WAYS = {
    "layers": layers,
    "function": function,
    "parts": parts,
    "whole": lambda model, backend: torch.compile(model, backend=backend),
    "whole in place": in_place,
    "regions": lambda model, backend: compile_regions(model, backend=backend),
}
SLOW = ("parts", "whole", "whole in place", "regions")


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow if way in SLOW else ()) for way in WAYS])
def test_a_compiled_model_is_measured_eagerly_and_trains_on_with_the_same_graphs(way):
    check(WAYS[way])


def test_the_same_where_torch_cannot_be_told_to_run_eagerly(monkeypatch):
    monkeypatch.delattr(torch.compiler, "set_stance")  # torch below 2.6
    check(layers)


@pytest.mark.slow
def test_the_same_under_fsdp2(tmp_path):
    model, processor = tiny_models.llava()
    expected = evaluate_mir(model, Probe.from_pairs(pairs(4)), processor=processor).mir
    for rank in run_ranks("tests.distributed.compile_worker", tmp_path):
        assert rank["watched"] == rank["plain"]
        assert rank["plain"]["graphs"] > 0
        assert rank["values"][0] == pytest.approx(expected, abs=1e-6)
        assert len(set(rank["values"])) == 3


def check(compile_with):
    """Train a compiled model without and with evaluations."""
    probe = Probe.from_pairs(pairs(4), matched=True)
    model, processor = tiny_models.llava(dropout=0.2)
    settings = {"processor": processor, "batch_size": 2, "vision_gain": True}
    expected = evaluate_mir(model, probe, **settings)
    backend = Backend()
    model = compile_with(model, backend)
    before = evaluate_mir(model, probe, **settings)
    assert backend.graphs == 0
    assert (before.per_layer, before.vision_gain) == (expected.per_layer, expected.vision_gain)

    batch = collator(processor)(pairs(2, seed=9))
    start, own = copy.deepcopy(model.state_dict()), [set(vars(module)) for module in model.modules()]
    plain = train(model, batch)
    graphs = backend.graphs
    assert graphs > 0
    assert len(set(plain)) == len(plain)
    model.load_state_dict(start)
    reports = []
    watched = train(model, batch, lambda: reports.append(evaluate_mir(model, probe, **settings)))
    assert watched == plain
    assert backend.graphs == graphs
    assert [set(vars(module)) for module in model.modules()] == own

    assert reports[0].per_layer == expected.per_layer
    weights = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    again, _ = tiny_models.llava()
    again.load_state_dict(weights)
    assert reports[-1].per_layer == evaluate_mir(again, probe, **settings).per_layer


def train(model, batch, evaluate=lambda: None):
    """The losses of two steps, with evaluations before each and after the last."""
    torch.manual_seed(3)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        evaluate()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    evaluate()
    return losses


def test_the_best_weights_of_layers_that_were_replaced_can_be_loaded(tmp_path):
    model, processor = tiny_models.llava()
    monitor_saver = default_saver(layers(model, "eager"))
    trainer = make_trainer(tmp_path / "run", wrap=lambda _: model)
    for number, save in enumerate((monitor_saver, TrainerSaver(trainer))):
        folder = tmp_path / str(number)
        folder.mkdir()
        save(folder)
        loaded = LlavaForConditionalGeneration.from_pretrained(folder)
        probe = Probe.from_pairs(pairs(4))
        assert (
            evaluate_mir(loaded, probe, processor=processor).mir == evaluate_mir(model, probe, processor=processor).mir
        )
