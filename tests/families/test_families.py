# SPDX-License-Identifier: Apache-2.0
"""Every family of the registry: right at any batch size and training as without MIR, or refused with its reason."""

import copy
import re

import pytest
import torch
from transformers import Trainer, TrainingArguments

from mir_callback import MIRCallback, Probe, evaluate_mir
from mir_callback.errors import MIRError
from mir_callback.model.parallelism import SampleShare
from mir_callback.probe.adapters import find_adapter
from mir_callback.probe.batches import encode_probe
from tests.families.reference import mir_of
from tests.families.registry import families
from tests.families.run import PAGE
from tests.layouts import documents
from tests.samples import pairs

ALL = families()


def entries(which):
    """Parameters of a test: those of `make test` as they are, all others with the marker of their environment."""
    return [
        pytest.param(family, id=family.name, marks=[] if family.short else [pytest.mark.families])
        for family in ALL
        if which(family)
    ]


@pytest.fixture(scope="module")
def samples():
    return pairs(4)


@pytest.mark.parametrize("family", entries(lambda family: not family.refused))
def test_value_is_that_of_the_reference(family, samples):
    expected = mir_of(family, *family.build(), samples)
    model, processor = family.build()
    report = evaluate_mir(model, Probe.from_pairs(samples), processor=processor, batch_size=2)
    assert report.mir == pytest.approx(expected, abs=1e-5)
    assert (report.batch_size == 1) == family.alone


@pytest.mark.parametrize("family", entries(lambda family: family.refused))
def test_refused_with_its_reason(family, samples):
    model, processor = family.build()
    with pytest.raises(MIRError, match=family.refused):
        evaluate_mir(model, Probe.from_pairs(samples), processor=processor, batch_size=2)


@pytest.mark.families
@pytest.mark.parametrize("family", entries(lambda family: not family.refused))
def test_images_among_texts_have_the_value_of_the_reference_or_are_refused(family):
    model, processor = family.build()
    probe = Probe.from_samples(documents())
    if family.one_image:
        with pytest.raises(MIRError, match=family.one_image):
            evaluate_mir(model, probe, processor=processor, batch_size=2)
        return
    report = evaluate_mir(model, probe, processor=processor, batch_size=2)
    assert report.mir == pytest.approx(mir_of(family, *family.build(), documents()), abs=1e-5)


@pytest.mark.families
@pytest.mark.parametrize("family", entries(lambda family: not family.refused))
def test_value_does_not_depend_on_batches_and_padding(family, samples):
    probe, values = Probe.from_pairs(samples), []
    for batch_size, side in ((1, None), (3, "left"), (4, "right")):
        model, processor = family.build()
        if side is not None:
            processor.tokenizer.padding_side = side
        values.append(evaluate_mir(model, probe, processor=processor, batch_size=batch_size).mir)
    assert values == pytest.approx([values[0]] * 3, abs=1e-5)


class Samples(torch.utils.data.Dataset):
    """Encoded samples, each with its tokens as labels."""

    def __init__(self, encoded):
        self._encoded = encoded

    def __len__(self):
        return len(self._encoded)

    def __getitem__(self, index):
        return self._encoded[index]


def trained(family, folder, probe, *, watched):
    """Losses and weights after two steps, and records with MIR."""
    torch.manual_seed(1)
    model, processor = family.build()
    adapter = find_adapter(model, processor)
    shard = encode_probe(probe, adapter, share=SampleShare(), batch_size=1).shard
    encoded = [batch.on(torch.device("cpu"), torch.float32).inputs for batch in shard.batches]
    data = Samples([{**each, "labels": each["input_ids"].clone()} for each in encoded])
    options = {
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
    }
    arguments = TrainingArguments(
        str(folder), save_strategy="no", remove_unused_columns=False, disable_tqdm=True, **options
    )
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=lambda batch: copy.copy(batch[0]))
    trainer.processing_class = processor
    records = []
    if watched:
        callback = MIRCallback(probe, every=1, batch_size=2, processor=processor).attach(trainer)
    trainer.train()
    if watched:
        records = callback.history
    losses = [(row["step"], row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row]
    return losses, {name: each.detach().clone() for name, each in model.state_dict().items()}, records


@pytest.mark.families
@pytest.mark.parametrize("family", entries(lambda family: family.trains and not family.refused))
def test_training_is_the_same_to_the_last_bit(family, samples, tmp_path):
    probe = Probe.from_pairs(samples)
    losses, weights, _ = trained(family, tmp_path / "plain", probe, watched=False)
    ours, theirs, records = trained(family, tmp_path / "watched", probe, watched=True)
    assert [record.step for record in records] == [0, 1, 2]
    assert all(record.mir is not None for record in records)
    assert repr(ours) == repr(losses)
    assert [name for name, each in theirs.items() if not torch.equal(each, weights[name])] == []


def test_the_page_lists_every_family():
    text = PAGE.read_text(encoding="utf-8")
    listed = re.findall(r"^\| ([^|]+?) \|", text, re.MULTILINE)
    assert [name for name in listed if name not in ("family", "---")] == [
        *(family.name for family in ALL if not family.refused),
        *(family.name for family in ALL if family.refused),
    ]
    assert f"{len([family for family in ALL if not family.refused])} are right to 1e-5" in text
