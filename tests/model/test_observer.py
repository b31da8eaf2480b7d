# SPDX-License-Identifier: Apache-2.0
"""Nothing an evaluation touches stays changed, whether it succeeds or fails."""

import random

import numpy as np
import pytest
import torch

from mir_callback.model.observer import release_gathered_weights, undisturbed
from tests import tiny_models


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
        with undisturbed(model):
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
