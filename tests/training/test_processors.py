# SPDX-License-Identifier: Apache-2.0
"""Where the processor is found: as given, wherever a Trainer keeps it, or in the model's folder."""

from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from mir_callback import MIRCallback, Probe, attach_mir
from mir_callback.errors import ConfigError
from mir_callback.probe.processors import kept_by, search_processor
from tests.samples import pairs
from tests.training.runs import make_trainer

PLACES = ["processing_class", "data_collator", "train_dataset", "model", "callback"]


@pytest.fixture
def probe():
    return Probe.from_pairs(pairs(2))


@pytest.fixture
def trainer(tmp_path):
    """A Trainer that has the tokenizer only, as in many code bases; its processor beside it."""
    made = make_trainer(tmp_path / "run", steps=1)
    made.whole, made.processing_class = made.processing_class, made.processing_class.tokenizer
    made.callback_handler.processing_class = made.processing_class
    return made


def put(trainer, place):
    """Put the processor where some code base keeps it."""
    if place == "processing_class":
        trainer.processing_class = trainer.whole
    elif place == "callback":
        saver = TrainerCallback()
        saver.processor = trainer.whole
        trainer.add_callback(saver)
    else:
        getattr(trainer, place).processor = trainer.whole


@pytest.mark.parametrize("place", PLACES)
def test_a_processor_is_found_wherever_the_trainer_keeps_it(trainer, place):
    assert kept_by(trainer) is trainer.processing_class  # for models that need no more
    put(trainer, place)
    assert kept_by(trainer) is trainer.whole
    assert search_processor(trainer.model, trainer) is trainer.whole


def test_one_with_another_tokenizer_belongs_to_another_model(trainer, tmp_path):
    put(trainer, "callback")
    assert kept_by(trainer) is trainer.whole
    words = trainer.whole.tokenizer.get_vocab()
    trainer.processing_class = SimpleNamespace(get_vocab=lambda: {word: number + 1 for word, number in words.items()})
    assert kept_by(trainer) is trainer.processing_class
    trainer.whole.save_pretrained(tmp_path / "model")
    trainer.model.config._name_or_path = str(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"callbacks \(LlavaProcessor, whose tokenizer is not.*model's files in"):
        search_processor(trainer.model, trainer)
    trainer.processing_class = SimpleNamespace(get_vocab=lambda: {**words, "<one more>": len(words)})
    assert search_processor(trainer.model, trainer) is trainer.whole


def test_one_in_the_models_folder_is_the_last_that_is_looked_for(trainer, probe, tmp_path):
    trainer.whole.save_pretrained(tmp_path / "model")
    trainer.model.config._name_or_path = str(tmp_path / "model")
    callback = attach_mir(trainer, probe, also_on="start")
    trainer.train()
    put(trainer, "data_collator")
    other = MIRCallback(probe, also_on="start")  # not attached: it sees the tokenizer only
    trainer.remove_callback(callback)
    trainer.add_callback(other)
    trainer.train()
    assert len(callback.history) == 1


@pytest.mark.parametrize("as_given", [str, lambda folder: folder])
def test_a_folder_can_be_given(trainer, probe, tmp_path, as_given):
    trainer.whole.save_pretrained(tmp_path / "model")
    assert attach_mir(trainer, probe, processor=as_given(tmp_path / "model"))._trainer is trainer


def test_error_says_where_it_was_looked_for_and_what_to_do(trainer, probe, tmp_path):
    trainer.processing_class.save_pretrained(tmp_path / "tokenizer")
    trainer.model.config._name_or_path = str(tmp_path / "tokenizer")
    name = type(trainer.processing_class).__name__
    words = rf"processing_class \({name}\).*data_collator.*callbacks.*{tmp_path}.*--mir_processor"
    with pytest.raises(ConfigError, match=words):
        attach_mir(trainer, probe)
    trainer.add_callback(MIRCallback(probe))
    with pytest.raises(ConfigError, match=rf"processing_class \({name}\)"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_one_that_is_given_is_not_replaced_by_another(trainer, probe, tmp_path):
    put(trainer, "data_collator")
    with pytest.raises(ConfigError, match=f"{type(trainer.processing_class).__name__} is not a processor of images"):
        attach_mir(trainer, probe, processor=trainer.processing_class)
    with pytest.raises(ConfigError, match=f"{tmp_path}/none"):
        attach_mir(trainer, probe, processor=tmp_path / "none")


def test_code_in_a_folder_is_never_run(trainer, probe, tmp_path):
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Theirs: pass\n")
    (tmp_path / "processor_config.json").write_text('{"auto_map": {"AutoProcessor": "theirs.Theirs"}}')
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "theirs.Theirs"}, "model_type": "theirs"}')
    trainer.model.config._name_or_path = str(tmp_path)
    with pytest.raises(ConfigError):
        attach_mir(trainer, probe)
    with pytest.raises(ConfigError):
        attach_mir(trainer, probe, processor=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_no_trainer_no_places():
    assert kept_by(None) is None
    assert kept_by(SimpleNamespace()) is None
