# SPDX-License-Identifier: Apache-2.0
"""Nothing an evaluation touches stays changed, whether it succeeds or fails."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mir_callback import Probe, evaluate_mir
from mir_callback.model.isolation import preserve_training_state
from mir_callback.model.sharding import release_gathered_weights
from tests import tiny_models
from tests.samples import pairs


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


class Boom(Exception):
    """Raised inside the observed block."""


@pytest.mark.parametrize("fails", [False, True])
def test_flags_and_random_streams_are_restored(fails):
    model, _ = tiny_models.llava()
    model.train()
    model.model.vision_tower.eval()  # a tower the user keeps frozen in evaluation mode
    flags = [module.training for module in model.modules()]
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    expected = draws()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    try:
        with preserve_training_state(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            draws()
            if fails:
                raise Boom
    except Boom:
        pass
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()
    assert draws() == expected


def test_modules_that_do_more_than_a_flag_when_told_to_evaluate_are_not_told():
    class Merging(torch.nn.Linear):
        """Merges its adapter into its weight in evaluation mode, as some LoRA layers do."""

        def train(self, mode=True):
            if not mode:
                self.weight.data += 1
            return super().train(mode)

    layer = Merging(2, 2)
    before = layer.weight.detach().clone()
    with preserve_training_state(torch.nn.Sequential(layer)):
        assert not layer.training
    assert layer.training
    assert torch.equal(layer.weight, before)


def test_what_a_forward_leaves_in_a_module_is_taken_out_again():
    model, processor = tiny_models.qwen2_5_vl()
    before = model.model.rope_deltas
    evaluate_mir(model, Probe.from_pairs(pairs(2)), processor=processor)
    assert model.model.rope_deltas is before


def test_dtype_that_sharded_weights_show_is_restored():
    # What DeepSpeed does, at its smallest: a cast reaches the empty tensor, and gathering forgets it.
    model = torch.nn.Linear(2, 2)
    for parameter in model.parameters():
        parameter.ds_status = SimpleNamespace(name="NOT_AVAILABLE")
        parameter.data = torch.empty(0, dtype=torch.float16)
    model.bias.ds_status.name = "AVAILABLE"
    with preserve_training_state(model):
        for parameter in model.parameters():
            parameter.data = torch.empty(0, dtype=torch.float32)
    assert model.weight.dtype == torch.float16
    assert model.bias.dtype == torch.float32


def test_gathered_weights_are_released_by_the_first_owner_that_can():
    released = []

    class Optimizer:
        def empty_partition_cache(self):
            released.append(self)

    class Wrapper:
        optimizer = Optimizer()

    class PlainOptimizer:
        optimizer = None

    release_gathered_weights(None, PlainOptimizer(), Wrapper(), Wrapper.optimizer)
    assert released == [Wrapper.optimizer]
    release_gathered_weights(None, PlainOptimizer())
    assert len(released) == 1


class Replaces(torch.nn.Module):
    """Puts another buffer in the place of its own, and a tensor where a number was."""

    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", torch.ones(3), persistent=False)
        self.longest = 7

    def forward(self, x):
        self.register_buffer("frequencies", torch.zeros(3), persistent=False)
        self.longest = torch.tensor(9)
        return x


def test_buffers_and_numbers_that_a_forward_replaces_are_put_back():
    module = Replaces()
    before = module.frequencies
    with preserve_training_state(module):
        module(torch.zeros(1))
    assert module.frequencies is before
    assert module.longest == 7
    assert type(module.longest) is int
