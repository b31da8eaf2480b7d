# SPDX-License-Identifier: Apache-2.0
"""Whose number of layers counts: the language model's, also where configurations can't say so themselves."""

from types import SimpleNamespace

from mir_callback.model.decoder import text_config


def test_text_part_is_found_when_the_configuration_has_no_method_for_it():
    text = SimpleNamespace(num_hidden_layers=3)
    assert text_config(SimpleNamespace(config=SimpleNamespace(text_config=text, vision_config=None))) is text
    assert text_config(SimpleNamespace(config=text)) is text
