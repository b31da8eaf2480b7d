# SPDX-License-Identifier: Apache-2.0
"""Which positions are vision and which are text."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import WhisperConfig

from mir_callback.errors import ConfigError, UnsupportedModelError
from mir_callback.model.modality import count_all_text, modality_masks, parse_ids, vision_token_ids
from tests import tiny_models

V, PAD = 9, 0


def masks(ids, attention):
    found = modality_masks(torch.tensor([ids]), torch.tensor([attention]), (V,))
    return found.vision[0].int().tolist(), found.text[0].int().tolist()


def test_text_before_the_image_counts_in_neither():
    assert masks([1, 2, V, V, 3, 4], [1] * 6) == ([0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_in_neither(side):
    ids, real = [1, V, V, 3], [1] * 4
    padded = ([PAD, PAD, *ids], [0, 0, *real]) if side == "left" else ([*ids, PAD, PAD], [*real, 0, 0])
    vision, text = masks(*padded)
    assert (sum(vision), sum(text)) == (2, 1)
    assert text.index(1) == (5 if side == "left" else 3)


def test_text_between_two_images_counts_in_neither():
    assert masks([V, 2, V, 3], [1] * 4) == ([1, 0, 1, 0], [0, 0, 0, 1])


def test_a_sample_without_image_has_no_text():
    assert masks([1, 2, 3], [1, 1, 1]) == ([0, 0, 0], [0, 0, 0])


def test_a_padded_image_id_is_not_vision():
    assert masks([V, 2, V], [1, 1, 0]) == ([1, 0, 0], [0, 1, 0])


@given(st.lists(st.tuples(st.sampled_from([1, 2, V]), st.booleans()), min_size=1, max_size=20))
def test_masks_are_disjoint_real_and_text_follows_all_vision(tokens):
    ids = torch.tensor([[token for token, _ in tokens]])
    real = torch.tensor([[real for _, real in tokens]])
    found = modality_masks(ids, real.long(), (V,))
    assert not (found.vision & found.text).any()
    assert not ((found.vision | found.text) & ~real).any()
    if found.text.any():
        assert found.text.nonzero()[:, 1].min() > found.vision.nonzero()[:, 1].max()


@given(st.lists(st.tuples(st.sampled_from([1, 2, V, 7, 8]), st.booleans()), min_size=1, max_size=20), st.booleans())
def test_all_text_is_what_is_real_and_no_image_behind_the_special_tokens_at_the_beginning(tokens, counts):
    ids = torch.tensor([[token for token, _ in tokens]])
    real = torch.tensor([[real for _, real in tokens]])
    plain = modality_masks(ids, real.long(), (V,))
    found = count_all_text(plain, ids, real.long(), (7, 8), torch.tensor([counts]))
    assert found.vision.equal(plain.vision)
    if not counts:
        assert found.text.equal(plain.text)
        return
    expected, begun = [], False
    for token, is_real in tokens:
        begun = begun or (is_real and token not in (7, 8))
        expected.append(is_real and begun and token != V)
    assert found.text[0].tolist() == expected


@pytest.mark.parametrize("build", [tiny_models.llava, tiny_models.qwen2_5_vl, tiny_models.idefics3])
def test_ids_come_from_the_configuration(build):
    model, processor = build()
    assert processor.tokenizer.convert_tokens_to_ids(processor.image_token) in vision_token_ids(model)


def test_error_when_the_configuration_names_no_image_token():
    model, _ = tiny_models.llava()
    with pytest.raises(UnsupportedModelError, match="has no vision tokens: .*image_token_id"):
        vision_token_ids(model.model.language_model)


@pytest.mark.parametrize("written", ["", "a", "3-", "-3", "5-4", "1,,2", "0x3", "3-100000000000", 3, [3]])
def test_ids_that_are_none_are_refused(written):
    with pytest.raises(ConfigError, match="vision_ids="):
        parse_ids(written)


def test_ids_given_take_the_place_of_the_configurations():
    model, _ = tiny_models.llava()
    assert vision_token_ids(model, "7-9,3") == (3, 7, 8, 9)


def test_a_part_for_sound_makes_no_encoder_decoder(monkeypatch):
    model, _ = tiny_models.llava()
    model.config.audio_config = WhisperConfig()
    parts = {**model.config.sub_configs, "audio_config": WhisperConfig}
    monkeypatch.setattr(type(model.config), "sub_configs", parts)
    assert vision_token_ids(model)
