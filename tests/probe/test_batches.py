# SPDX-License-Identifier: Apache-2.0
"""Samples as model inputs: shares of ranks, prompts, cuts, and refusals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mir_callback import Probe
from mir_callback.errors import ConfigError, ProbeError
from mir_callback.model.modality import vision_token_ids
from mir_callback.model.parallelism import SampleShare
from mir_callback.probe.adapters import HuggingFaceAdapter, cut_text
from mir_callback.probe.batches import encode_probe, samples_of
from mir_callback.probe.markup import find_markup
from mir_callback.probe.sample import Sample
from tests import tiny_models
from tests.samples import SENTENCE, pairs


def encode(model, processor, probe, part=0, parts=1, batch_size=4):
    adapter = HuggingFaceAdapter(model, processor)
    return encode_probe(probe, adapter, share=SampleShare(part, parts), batch_size=batch_size)


@given(st.integers(1, 200), st.integers(1, 17), st.integers(1, 4), st.booleans())
def test_shares_cover_every_sample_once_and_are_equally_long(num_samples, parts, peers, everywhere):
    ranks = [SampleShare(part, parts, leads=peer == 0) for part in range(parts) for peer in range(peers)]
    samples = [Sample.pair("", b"", "")] * num_samples
    shares = [samples_of(share, samples, everywhere=everywhere) for share in ranks]
    kept = sorted(index for share in shares for index, keep in share if keep)
    assert kept == list(range(num_samples))
    assert len({len(share) for share in shares}) == 1
    if everywhere:
        assert all([index for index, _ in share] == list(range(num_samples)) for share in shares)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_every_rank_gets_the_same_batches_and_the_same_tokens_come_out(world_size):
    model, processor = tiny_models.llava()
    probe = Probe.from_pairs(pairs(7))
    shares = [encode(model, processor, probe, rank, world_size, batch_size=3) for rank in range(world_size)]
    assert len({tuple(len(batch.keep) for batch in share.batches) for share in shares}) == 1
    assert sum(int(batch.keep.sum()) for share in shares for batch in share.batches) == 7
    assert all(batch.masks.vision.any(dim=1).all() for share in shares for batch in share.batches)
    alone = encode(model, processor, probe, batch_size=1)
    assert sorted(digest for share in shares for digest in share.digests) == sorted(alone.digests)


def test_texts_are_cut_to_max_text_tokens():
    model, processor = tiny_models.llava()
    probe = Probe.from_pairs([(image, SENTENCE * 5) for image, _ in pairs(3)], max_text_tokens=9)
    encoded = encode(model, processor, probe)
    assert encoded.batches[0].masks.text.sum(dim=1).tolist() == [9, 9, 9]


@pytest.mark.parametrize("fast", [True, False])
def test_cut_keeps_the_beginning_and_short_texts_whole(fast):
    _, processor = tiny_models.llava()

    class Slow:
        """A tokenizer without offsets, as slow tokenizers are."""

        is_fast = False
        decode = staticmethod(processor.tokenizer.decode)

        def __call__(self, text, **options):
            return processor.tokenizer(text, **options)

    tokenizer = processor.tokenizer if fast else Slow()
    cut = cut_text(tokenizer, SENTENCE, 5)
    assert SENTENCE.startswith(cut)
    assert len(processor.tokenizer(cut, add_special_tokens=False)["input_ids"]) == 5
    assert cut_text(tokenizer, SENTENCE, 500) == SENTENCE


def test_qwen_image_stands_between_its_wrapper_tokens_with_multimodal_positions():
    model, processor = tiny_models.qwen2_5_vl()
    image = find_markup(processor, processor.tokenizer, model.config, vision_token_ids(model))
    assert image.written == "<|vision_start|><|image_pad|><|vision_end|>"
    inputs = encode(model, processor, Probe.from_pairs(pairs(2))).batches[0].inputs
    assert {"image_grid_thw", "mm_token_type_ids"} <= inputs.keys()


def test_labels_never_reach_the_forward():
    for build in (tiny_models.llava, tiny_models.paligemma):
        model, processor = build()
        assert "labels" not in encode(model, processor, Probe.from_pairs(pairs(2))).batches[0].inputs


def test_error_when_processor_is_missing_or_a_bare_tokenizer():
    model, processor = tiny_models.llava()
    for wrong, words in ((None, "No processor"), (processor.tokenizer, type(processor.tokenizer).__name__)):
        with pytest.raises(ConfigError, match=f"{words}.*processor=AutoProcessor"):
            encode(model, wrong, Probe.from_pairs(pairs(1)))


def test_error_when_tokenizer_cannot_pad_but_only_if_it_has_to():
    model, processor = tiny_models.llava()
    processor.tokenizer.pad_token = None
    probe = Probe.from_pairs(pairs(2))
    with pytest.raises(ConfigError, match="pad token"):
        encode(model, processor, probe, batch_size=2)
    assert len(encode(model, processor, probe, batch_size=1).batches) == 2


def test_error_when_a_sample_is_longer_than_the_model():
    model, processor = tiny_models.llava()
    long = Probe.from_pairs([(pairs(1)[0][0], SENTENCE * 60)])
    with pytest.raises(ProbeError, match=r"pair 0 has \d+ tokens.* 512.*max_text_tokens"):
        encode(model, processor, long)


@pytest.mark.parametrize("token", ["<image>", "</s>", "<pad>"])
def test_error_names_the_sample_when_its_text_has_a_special_token(token):
    model, processor = tiny_models.llava()
    (first, _), (image, _) = pairs(2)
    probe = Probe.from_pairs([(first, "plain"), (image, f"a text with {token} in it")])
    with pytest.raises(ProbeError, match=f"text of pair 1 .*'{token}'"):
        encode(model, processor, probe)


def test_error_when_processor_belongs_to_another_model():
    model, processor = tiny_models.llava()
    model.config.image_token_index = 7
    with pytest.raises(ConfigError, match=r"none of the model's image tokens \(7\).*belongs to this model"):
        encode(model, processor, Probe.from_pairs(pairs(1)))


def test_error_names_samples_when_the_processor_fails():
    model, processor = tiny_models.llava()
    adapter = HuggingFaceAdapter(model, processor)

    def broken(*args, **kwargs):
        raise RuntimeError("no such size")

    processor.image_processor.preprocess = broken
    type(processor.image_processor).__call__, original = broken, type(processor.image_processor).__call__
    try:
        with pytest.raises(ProbeError, match="pair 0, pair 1: RuntimeError: no such size"):
            adapter.encode(Probe.from_pairs(pairs(2)).samples, 100)
    finally:
        type(processor.image_processor).__call__ = original


def test_moving_a_batch_casts_floats_only():
    model, processor = tiny_models.llava()
    batch = encode(model, processor, Probe.from_pairs(pairs(2))).batches[0].on(torch.device("cpu"), torch.bfloat16)
    assert batch.inputs["pixel_values"].dtype is torch.bfloat16
    assert batch.inputs["input_ids"].dtype is torch.int64
