# SPDX-License-Identifier: Apache-2.0
"""A vision tower that LLaVA has loaded by itself, under the transformers of the main environment."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from llava_integration.common import explain, tower_states_checked
from mir_callback.errors import UnsupportedModelError

LAYERS = 3


class Tower(torch.nn.Module):
    """As in the package llava: a CLIP model below a plain module."""

    def __init__(self):
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=LAYERS, num_attention_heads=2, image_size=16
        )
        config.patch_size = 8
        self.vision_tower = CLIPVisionModel(config)

    def forward(self):
        return self.vision_tower(torch.zeros(1, 3, 16, 16), output_hidden_states=True).hidden_states


@pytest.fixture
def model():
    config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    language_model = LlamaForCausalLM(config)
    language_model.model.vision_tower = Tower()
    language_model.get_vision_tower = lambda: language_model.model.vision_tower
    return language_model


def test_a_tower_that_returns_each_state_twice_is_refused(model):
    tower = model.get_vision_tower()
    with tower_states_checked(model):
        assert len(tower()) == LAYERS + 1
    model(torch.zeros(1, 2, dtype=torch.long), output_hidden_states=True)
    assert len(tower()) > LAYERS + 1  # transformers has hooked the tower's layers again
    with (
        tower_states_checked(model),
        pytest.raises(
            UnsupportedModelError,
            match=r"returns 7 hidden states, not 4.*pip install transformers==4",
        ),
    ):
        tower()
    tower()  # the check is gone with its context


def test_a_failure_without_llava_is_not_explained_by_its_versions():
    with pytest.raises(ImportError) as caught:
        from transformers import no_such_name  # noqa: F401
    assert explain(caught.value) is None
