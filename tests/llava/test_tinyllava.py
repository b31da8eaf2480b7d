# SPDX-License-Identifier: Apache-2.0
"""The TinyLLaVA Factory adapter, on a stand-in for that package (tinyllava_stand_in says for what of it)."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from llava_integration import TinyLlavaAdapter, attach_mir
from mir_callback import Probe, evaluate_mir
from mir_callback.errors import ConfigError, ProbeError, UnsupportedModelError
from mir_callback.probe.adapters import find_adapter
from tests import reference
from tests.llava import tinyllava_stand_in as stand_in
from tests.samples import pairs, write_folders
from tests.training.runs import losses, weights

COUNT = 5


@pytest.fixture(autouse=True)
def package(monkeypatch):
    stand_in.install(monkeypatch)


@pytest.fixture
def probe():
    return Probe.from_pairs(pairs(COUNT, seed=2))


def make_model(**changes):
    return stand_in.TinyLlavaForConditionalGeneration(**changes).eval()


@torch.no_grad()
def single_steps(model, dataset):
    """MIR of what training reads: one sample at a time, all hidden states kept, positions counted from -200."""
    vision, text = [], []
    for item in dataset:
        ids = item["input_ids"]
        states = model(
            ids[None], torch.ones_like(ids)[None], images=item["image"][None], output_hidden_states=True
        ).hidden_states[1:]
        start = int((ids == -200).nonzero())
        count = 16  # a tower of 4 x 4 patches
        vision.append([state[0, start : start + count] for state in states])
        text.append([state[0, start + count :] for state in states])
    stacked = [[torch.cat(layer) for layer in zip(*rows, strict=True)] for rows in (vision, text)]
    return reference.rate(*stacked)[0]


@pytest.mark.parametrize("template", ["pretrain", "llama"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_aspect_ratio": "pad"},
        {"tokenizer_padding_side": "left"},
        {"tokenizer_model_max_length": 48},
    ],
    ids=str,
)
def test_value_equals_single_steps_through_training_data_at_every_batch_size(probe, changes, template):
    model = make_model(**changes)
    expected = single_steps(model, stand_in.Dataset(model, pairs(COUNT, seed=2), template))
    adapter = TinyLlavaAdapter(model, model.tokenizer, prompt=template)
    ours = [evaluate_mir(model, probe, adapter=adapter, batch_size=size).mir for size in (1, 3, COUNT)]
    assert ours == pytest.approx([expected] * 3, abs=1e-6)


def test_inputs_are_those_of_training(probe):
    model = make_model()
    dataset = stand_in.Dataset(model, pairs(COUNT, seed=2), "llama")
    batch = TinyLlavaAdapter(model, prompt="llama").encode(probe.samples, probe.max_text_tokens)
    for item, ids, image in zip(dataset, batch.token_ids, batch.inputs["images"], strict=True):
        assert torch.equal(ids, item["input_ids"])
        assert torch.equal(image, item["image"])
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == [len(ids) for ids in batch.token_ids]


def make_trainer(output_dir, template="pretrain"):
    model = make_model()
    torch.manual_seed(0)
    args = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    return Trainer(
        model=model,
        args=args,
        train_dataset=stand_in.Dataset(model, pairs(16, seed=9), template),
        data_collator=stand_in.collator(model.tokenizer.pad_token_id),
        processing_class=model.tokenizer,
    )


def test_training_is_bit_identical_with_the_line_added(tmp_path):
    images, texts = write_folders(tmp_path / "probe", COUNT)
    plain, watched = make_trainer(tmp_path / "plain"), make_trainer(tmp_path / "watched")
    callback = attach_mir(watched, images=images, texts=texts, num_samples=COUNT, every=2)
    for trainer in (plain, watched):
        trainer.train()
    assert [record.step for record in callback.history] == [0, 2, 4]
    assert len({record.mir for record in callback.history}) == 3
    assert losses(plain) == losses(watched)
    expected = weights(plain)
    assert all(torch.equal(value, expected[name]) for name, value in weights(watched).items())
    assert "prepare_inputs_labels_for_multimodal" not in vars(watched.model)


@pytest.mark.parametrize(
    ("of_run", "asked", "used"),
    [("llama", None, "llama"), ("pretrain", "llama", "llama"), ("pretrain", None, "pretrain")],
)
def test_template_is_the_runs_own_unless_asked(tmp_path, probe, of_run, asked, used):
    trainer = make_trainer(tmp_path, of_run)
    adapter = find_adapter(trainer.model, None, prompt=asked, trainer=trainer)
    found = adapter.encode(probe.samples, 100).token_ids
    expected = TinyLlavaAdapter(trainer.model, prompt=used).encode(probe.samples, 100).token_ids
    assert all(torch.equal(*both) for both in zip(found, expected, strict=True))


def test_a_template_written_out_gives_its_token_ids(tmp_path, probe):
    trainer = make_trainer(tmp_path, "llama")
    named = {name: find_adapter(trainer.model, None, prompt=name, trainer=trainer) for name in (None, "chat", "plain")}
    assert named[None].prompt == named["chat"].prompt == "Two talk. USER: {image} ASSISTANT: {text}</s>"
    assert named["plain"].prompt == TinyLlavaAdapter(trainer.model, prompt="pretrain").prompt == "{image}{text}\n"
    for adapter in named.values():
        written = TinyLlavaAdapter(trainer.model, prompt=adapter.prompt)
        found = [each.encode(probe.samples, 100).token_ids for each in (adapter, written)]
        assert all(torch.equal(*both) for both in zip(*found, strict=True))
    with pytest.raises(ConfigError, match="prompt='chat'.*--conv_ver"):
        find_adapter(trainer.model, None, prompt="chat", trainer=make_trainer(tmp_path, "pretrain"))
    with pytest.raises(ConfigError, match="'<image>'"):
        TinyLlavaAdapter(trainer.model, prompt="<image>{image}{text}")


def test_texts_are_cut_and_must_not_hold_the_placeholder(probe):
    adapter = TinyLlavaAdapter(make_model())
    # The image, three tokens of text, a newline.
    assert [len(ids) for ids in adapter.encode(probe.samples, 3).token_ids] == [5] * COUNT
    image, _ = pairs(1)[0]
    with pytest.raises(ProbeError, match="text of pair 0 .*'<image>'"):
        adapter.encode(Probe.from_pairs([(image, "an <image> here")]).samples, 100)


def test_error_when_truncation_leaves_no_text(probe):
    model = make_model(tokenizer_model_max_length=16)
    with pytest.raises(ProbeError, match="no text tokens .*tokenizer_model_max_length"):
        evaluate_mir(model, probe, adapter=TinyLlavaAdapter(model))


def test_errors_say_what_the_adapter_needs():
    with pytest.raises(ConfigError, match="prompt='v1'.*--conv_ver"):
        TinyLlavaAdapter(make_model(), prompt="v1")
    with pytest.raises(ConfigError, match="image_aspect_ratio='anyres'"):
        TinyLlavaAdapter(make_model(image_aspect_ratio="anyres"))
    without = make_model()
    without.tokenizer = None
    with pytest.raises(ConfigError, match="No tokenizer given"):
        TinyLlavaAdapter(without)
    model = make_model()
    model.vision_tower._image_processor = None
    with pytest.raises(UnsupportedModelError, match="not a TinyLLaVA model"):
        TinyLlavaAdapter(model)
