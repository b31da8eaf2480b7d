# SPDX-License-Identifier: Apache-2.0
"""Token counts without a forward are those that an evaluation has."""

from mir_callback import Probe, evaluate_mir
from mir_callback.probe.adapters import HuggingFaceAdapter
from mir_callback.probe.batches import counts_of_model, counts_of_tokenizer
from tests import tiny_models
from tests.samples import pairs


def test_counts_and_fingerprint_are_those_of_an_evaluation():
    model, processor = tiny_models.llava()
    probe = Probe.from_pairs(pairs(5))
    counts = counts_of_model(probe, HuggingFaceAdapter(model, processor))
    report = evaluate_mir(model, probe, processor=processor)
    assert sum(counts.vision) == report.num_vision_tokens
    assert sum(counts.text) == report.num_text_tokens
    assert counts.fingerprint == report.tokens_fingerprint
    assert counts.vision == [16] * 5


def test_a_tokenizer_alone_counts_the_cut_texts():
    _, processor = tiny_models.llava()
    whole = counts_of_tokenizer(Probe.from_pairs(pairs(5)), processor.tokenizer)
    cut = counts_of_tokenizer(Probe.from_pairs(pairs(5), max_text_tokens=4), processor.tokenizer)
    assert whole.vision is None
    assert min(whole.text) > 4
    assert cut.text == [4] * 5
