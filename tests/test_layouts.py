# SPDX-License-Identifier: Apache-2.0
"""Evaluations on samples of any layout: which rows count, on any number of ranks, and what values compare."""

import dataclasses
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mir_callback import EvalRecord, Probe, evaluate_mir
from mir_callback.analysis.curves import find_mismatch, keep_comparable
from mir_callback.analysis.load import Run
from mir_callback.analysis.page.facts import find_incomparable, make_cards
from mir_callback.analysis.page.views import RunView
from mir_callback.analysis.pictures import draw_sheet
from mir_callback.analysis.samples import draw_images
from mir_callback.config import MIRConfig
from mir_callback.errors import ConfigError, HistoryError, ProbeError
from mir_callback.evaluation.evaluate import Evaluator
from mir_callback.evaluation.trial import unlike_pairs
from mir_callback.history import FILE_NAME, History
from mir_callback.model.parallelism import SampleShare
from mir_callback.probe.adapters import HuggingFaceAdapter
from mir_callback.probe.batches import counts_of_model, counts_of_tokenizer, encode_probe, exchange_images, samples_of
from mir_callback.probe.sample import Picture, Sample, Video
from mir_callback.record import DEFINITION_FIELDS, as_records, read_definition
from tests import reference, tiny_models
from tests.analysis.pages import page_of
from tests.layouts import mixed
from tests.samples import pairs
from tests.test_vision_gain import model_hook


@pytest.fixture(scope="module")
def probe():
    return Probe.from_samples(mixed(), matched=True)


@torch.no_grad()
def rows_of(model, processor, samples, *, every_position, with_text_only):
    """Vision and text rows of every layer, and the loss on text, one sample at a time by transformers itself."""
    vision, text, losses, image_id = [], [], [], model.config.image_token_id
    for parts in samples:
        images = [part for part in parts if not isinstance(part, str)]
        if not images and not with_text_only:
            continue
        prompt = "".join(part if isinstance(part, str) else "<image>" for part in parts)
        inputs = processor(images=images or None, text=prompt, return_tensors="pt")
        ids = inputs["input_ids"][0]
        outputs = model.eval()(**inputs, output_hidden_states=True)
        is_image = ids == image_id
        last = int(is_image.nonzero()[-1]) if images else -1
        at = [i for i in range(len(ids)) if not is_image[i] and (every_position or i > last)]
        vision.append([state[0, is_image] for state in outputs.hidden_states[1:]])
        text.append([state[0, at] for state in outputs.hidden_states[1:]])
        logs = outputs.logits[0].double().log_softmax(dim=-1)
        losses.append([-float(logs[i - 1, ids[i]]) for i in at[1:]])
    stacked = [[torch.cat(layer) for layer in zip(*rows, strict=True)] for rows in (vision, text)]
    return *stacked, sum(map(sum, losses)) / sum(map(len, losses))


@pytest.mark.parametrize("text_positions", ["after_image", "all"])
@pytest.mark.parametrize("text_only", ["leave_out", "count"])
def test_value_is_that_of_the_rows_asked_for(probe, text_positions, text_only):
    model, processor = tiny_models.llava()
    wanted = {"every_position": text_positions == "all", "with_text_only": text_only == "count"}
    vision, text, loss = rows_of(model, processor, mixed(), **wanted)
    adapter = HuggingFaceAdapter(model, processor, text_positions=text_positions)
    options = {"text_positions": text_positions, "text_only": text_only, "probe_loss": True}
    expected, distances = reference.rate(vision, text)
    for batch_size in (1, 4):
        options["standard_error"] = batch_size == 4 and text_only == "count"
        report = evaluate_mir(model, probe, adapter=adapter, batch_size=batch_size, **options)
        assert report.mir == pytest.approx(expected, abs=1e-5)
        assert report.per_layer == pytest.approx(distances, rel=1e-4)
        assert (report.num_vision_tokens, report.num_text_tokens) == (len(vision[0]), len(text[0]))
        assert report.probe_loss == pytest.approx(loss, rel=1e-5)
        assert report.num_samples == (9 if wanted["with_text_only"] else 6)
        assert report.influences is None or len(report.influences) == report.num_samples
        assert (report.text_positions, report.text_only) == (text_positions, text_only)


def test_samples_left_out_change_nothing(probe):
    model, processor = tiny_models.llava()
    adapter = HuggingFaceAdapter(model, processor)
    some = Probe(tuple(sample for sample in probe.samples if sample.has_vision), matched=True)
    whole, part = (evaluate_mir(model, each, adapter=adapter) for each in (probe, some))
    assert (whole.mir, whole.influences, whole.tokens_fingerprint) == (
        part.mir,
        part.influences,
        part.tokens_fingerprint,
    )
    assert whole.probe_fingerprint == probe.fingerprint != part.probe_fingerprint


class PairsOnly(HuggingFaceAdapter):
    """An adapter of the time of pairs."""

    def encode(self, samples, max_text_tokens):
        pairs_ = [Sample.pair(each.name, each.parts[0].data, each.text) for each in samples if each.open_image()]
        return super().encode(pairs_, max_text_tokens)


def test_what_an_adapter_does_not_take_is_refused_by_name_before_any_forward(probe):
    model, processor = tiny_models.llava()
    paired = PairsOnly(model, processor)
    beside = Probe.from_samples([*pairs(4), ["a text alone"]], matched=True)
    with model_hook(model, pytest.fail):
        with pytest.raises(ProbeError, match="sample 1 holds 2 images and 3 texts; this adapter takes one image"):
            evaluate_mir(model, probe, adapter=paired)
        with pytest.raises(ProbeError, match="sample 4 holds 1 text; this adapter takes one image"):
            evaluate_mir(model, beside, adapter=paired, text_only="count")
        with pytest.raises(ConfigError, match="text_positions='all': PairsOnly .*'after_image'"):
            evaluate_mir(model, probe, adapter=paired, text_positions="all")
        with pytest.raises(ConfigError, match="text_positions='after_image': HuggingFaceAdapter .*'all'"):
            evaluate_mir(model, probe, adapter=HuggingFaceAdapter(model, processor, text_positions="all"))
        with pytest.raises(ProbeError, match="vision_gain .* sample 2 has none.*leave_out"):
            evaluate_mir(model, probe, processor=processor, vision_gain=True, text_only="count")
    assert evaluate_mir(model, beside, adapter=paired).num_samples == 4


def test_a_document_that_ends_with_an_image_has_no_text_after_it_but_may_count_all_of_its_text(caplog):
    model, processor = tiny_models.llava()
    images, texts = zip(*pairs(3), strict=True)
    probe = Probe.from_samples([[images[0], texts[0]], [texts[1], images[1], "\n"], ["a text alone"]])
    with model_hook(model, pytest.fail), pytest.raises(ProbeError, match=r"sample 1 \(.*\) has no text after its last"):
        evaluate_mir(model, probe, processor=processor)
    with caplog.at_level("INFO", "mir_callback"):
        report = evaluate_mir(model, probe, processor=processor, text_positions="all")
    assert report.num_samples == 2
    assert "1 of the probe's 3 samples have no image and are not measured" in caplog.messages


@pytest.mark.parametrize("option", ["text_positions", "text_only"])
def test_error_names_the_values_an_option_may_have(option):
    with pytest.raises(ConfigError, match=f"{option} must be one of .*, got 'some'"):
        MIRConfig(**{option: "some"})


def sample_of(name, kinds, image=b""):
    parts = {"i": Picture(image), "t": "text", "v": Video((image,))}
    return Sample(name, tuple(parts[kind] for kind in kinds))


@given(
    st.lists(st.sampled_from(["it", "tit", "t", "vt", "ivt", "tt"]), min_size=1, max_size=40),
    st.integers(1, 7),
    st.integers(1, 3),
)
def test_all_ranks_forward_the_same_modalities_in_the_same_order(layouts, parts, batch_size):
    samples = [sample_of(f"{index}", kinds) for index, kinds in enumerate(layouts)]
    shares = [samples_of(SampleShare(part, parts), samples) for part in range(parts)]
    kinds = [[frozenset(samples[index].kinds) for index, _ in share] for share in shares]
    assert all(each == kinds[0] for each in kinds)
    vision = [each != {"text"} for each in kinds[0]]
    assert vision == sorted(vision, reverse=True)  # so that the first forward is one with images
    assert sorted(index for share in shares for index, keep in share if keep) == list(range(len(samples)))


def test_a_batch_has_samples_of_the_same_modalities(probe):
    model, processor = tiny_models.llava()
    encoded = encode_probe(
        probe, HuggingFaceAdapter(model, processor), share=SampleShare(), batch_size=4, text_only="count"
    )
    assert [len(batch.names) for batch in encoded.batches] == [4, 2, 3]
    assert all(("pixel_values" in batch.inputs) == bool(batch.masks.vision.any()) for batch in encoded.batches)


def drawn(*layouts):
    """Samples with a different image in each place."""
    samples = []
    for index, kinds in enumerate(layouts):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 6), (index, 0, 0)).save(buffer, "BMP")
        samples.append(sample_of(f"s{index}", kinds, buffer.getvalue()))
    return samples


def reds(sample):
    return [image.getpixel((0, 0))[0] for image in sample.open_images()]


def test_images_are_exchanged_between_samples_of_one_layout():
    samples = drawn("it", "iti", "it", "iti", "ti", "ti", "it")
    found = exchange_images(samples)
    assert [each.kinds for each in found] == [each.kinds for each in samples]
    assert [reds(each) for each in found] == [[2], [3, 3], [6], [1, 1], [5], [4], [0]]
    assert [each.texts for each in found] == [each.texts for each in samples]


@pytest.mark.parametrize(
    ("layouts", "message"),
    [
        (["it", "it", "iti"], "no other sample holds images and texts in the order of s2"),
        (["it", "it", "t"], "s2 has none"),
        (["it"], "1 of the 1 samples have the same"),
    ],
)
def test_images_that_cannot_be_exchanged_are_refused_by_name(layouts, message):
    with pytest.raises(ProbeError, match=message):
        exchange_images(drawn(*layouts))


def test_all_images_of_a_sample_count_as_one_when_they_are_compared():
    samples = drawn("iit", "iit", "iit")
    same = [samples[0], dataclasses.replace(samples[0], name="again"), samples[1]]
    with pytest.raises(ProbeError, match="2 of the 3 samples have the same"):
        exchange_images(same)


def test_gain_of_two_images_and_texts_between_is_that_of_the_models_own_losses():
    model, processor = tiny_models.llava()
    samples = [[text, image, "then", image.rotate(90), "last words"] for image, text in pairs(5)]
    images = [[part for part in sample if not isinstance(part, str)] for sample in samples]
    other = [
        [sample[0], images[(i + 1) % 5][0], "then", images[(i + 1) % 5][1], "last words"]
        for i, sample in enumerate(samples)
    ]
    losses = [
        rows_of(model, processor, each, every_position=True, with_text_only=False)[2] for each in (samples, other)
    ]
    probe = Probe.from_samples(samples, matched=True)
    options = {"text_positions": "all", "vision_gain": True, "standard_error": False}
    report = evaluate_mir(model, probe, processor=processor, batch_size=2, **options)
    assert report.vision_gain == pytest.approx(losses[1] - losses[0], abs=2e-6)
    assert report.probe_loss == pytest.approx(losses[0], rel=1e-6)


def test_counts_are_of_every_sample_of_the_probe(probe):
    model, processor = tiny_models.llava()
    counts = counts_of_model(probe, HuggingFaceAdapter(model, processor))
    assert counts.vision == [16, 32, 0] * 3
    assert [bool(count) for count in counts.text] == [True, True, False] * 3
    assert all(counts_of_tokenizer(probe, processor.tokenizer).text)


HOW = {"probe_fingerprint": "p", "tokens_fingerprint": "t", "root": "exact", "prompt": "{image}{text}"}
NOW = {**HOW, "text_positions": "after_image", "text_only": "leave_out"}


def runs_of(*hows):
    records = (tuple(as_records([{"step": step, "mir": 2.0, **how} for step in (1, 2)])) for how in hows)
    return [Run(f"run{i}", None, None, each) for i, each in enumerate(records)]


@pytest.mark.parametrize("option", [{"text_positions": "all"}, {"text_only": "count"}])
def test_values_of_before_compare_with_the_default_and_not_with_others(tmp_path, option):
    (name, value), other = *option.items(), {**NOW, **option}
    assert name in DEFINITION_FIELDS
    assert find_mismatch(runs_of(HOW, NOW)) is None
    assert f"{name} (" in find_mismatch(runs_of(HOW, other))
    assert f"{name} (" in find_mismatch(runs_of(NOW, other))
    records = as_records([{"step": 1, "mir": 2.0, **HOW}, {"step": 2, "mir": 2.0, **other}])
    assert [record.step for record in keep_comparable(records)[0]] == [2]
    (tmp_path / FILE_NAME).write_text(EvalRecord(step=1, mir=2.0, **HOW).to_line())
    history = History()
    with pytest.raises(HistoryError, match=f"another {name}: .* is '{value}' now"):
        history.open(tmp_path, 2, other)
    history.open(tmp_path, 2, NOW)
    assert len(history.records) == 1
    history.close()


def test_what_a_failed_evaluation_counted_is_not_known():
    assert read_definition(EvalRecord(step=1, error="x"), "text_positions") is None


def test_definition_and_record_say_what_counted(probe):
    model, processor = tiny_models.llava()
    config = MIRConfig(text_positions="all", text_only="count")
    evaluator = Evaluator(model, probe, HuggingFaceAdapter(model, processor, text_positions="all"), config)
    assert evaluator.definition["text_positions"] == "all"
    record = EvalRecord.from_dict({"step": 1, **evaluator.evaluate(model).to_fields()})
    assert (record.text_positions, record.text_only) == ("all", "count")


def view_of(name="run", **fields):
    return RunView(name, as_records([{"step": 1, "mir": 1.0, "per_layer": [1.0], **HOW, **fields}]))


@pytest.mark.parametrize("text_only", ["leave_out", "count"])
def test_a_page_shows_all_images_of_each_sample_and_the_effects_of_those_measured(probe, text_only):
    count = 9 if text_only == "count" else 6
    influences = [float(index + 1) for index in range(count)]
    run = view_of(probe_fingerprint=probe.fingerprint, text_only=text_only, influences=influences)
    cards, whose = make_cards([run], probe)
    by_index = {card.index: card for card in cards}
    assert whose == "run at step 1"
    assert [by_index[i].effect is None for i in range(9)] == [i % 3 == 2 and text_only == "leave_out" for i in range(9)]
    known = [by_index[i].effect for i in range(9) if by_index[i].effect is not None]
    assert known == [influence / count for influence in influences]
    assert [by_index[i].picture is None for i in range(3)] == [False, False, True]
    assert by_index[1].text.startswith("before ")
    assert by_index[1].text.count("[image]") == 2
    page = page_of(run, probe=probe)
    assert page.count("<img ") == 6
    assert by_index[2].text in page


def test_a_page_says_which_runs_count_otherwise():
    assert find_incomparable([view_of("a"), view_of("b", **NOW)]) == []
    (message,) = find_incomparable([view_of("a"), view_of("b", text_positions="all")])
    assert "after_image, all" in message


def test_every_image_and_frame_is_on_the_sheet(tmp_path):
    colours = [(200, 20 * index, 0) for index in range(7)]
    images = [Image.new("RGB", (40, 30), colour) for colour in colours]
    probe = Probe.from_samples([[images[0], "a", images[1]], [images[2:], "a video"], ["a text alone"]])
    with Image.open(draw_sheet(probe, tmp_path / "sheet.png")) as sheet:
        shown = sheet.convert("RGB").getcolors(2**24)
    assert all(dict((colour, count) for count, colour in shown)[colour] > 100 for colour in colours)


@given(st.integers(1, 40))
def test_a_grid_has_room_for_any_number_of_images(count):
    image = Image.new("RGB", (4, 3), "red")
    picture = draw_images(Probe.from_samples([[[image] * count, "a"]]).samples[0], (60, 40))
    assert picture.width <= 60
    assert picture.height <= 40


def test_batches_are_checked_with_the_smallest_and_the_largest_sample_that_share_them():
    samples = drawn("it", "itt", "iit", "vt", "vtt", "t", "tt", "ivt")
    sizes = [(index, 10 - index, 5) for index in range(len(samples))]
    found = unlike_pairs(samples, sizes)
    # By vision tokens, then by images.
    names = [[each.name for each in pair] for pair in found]
    assert names == [["s2", "s0"], ["s1", "s2"], ["s4", "s3"], ["s6", "s5"]]
