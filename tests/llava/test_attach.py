# SPDX-License-Identifier: Apache-2.0
"""attach_mir finds what it needs in a Trainer, or says what is missing (the real LLaVA is in test_original)."""

from types import SimpleNamespace

import pytest
import torch

from mir_callback import PlateauRule, Probe, attach_mir
from mir_callback.errors import ConfigError, ProbeError, UnsupportedModelError
from tests.samples import write_folders
from tests.training.runs import losses, make_trainer


@pytest.fixture
def folders(tmp_path):
    images, texts = write_folders(tmp_path, 6)
    return {"images": images, "texts": texts}


def test_a_hugging_face_model_is_attached_with_its_trainers_processor(tmp_path, folders):
    trainer = make_trainer(tmp_path / "run", steps=2)
    callback = attach_mir(trainer, **folders, num_samples=5, every=1, stop=PlateauRule(), batch_size=3)
    trainer.train()
    assert [record.step for record in callback.history] == [0, 1, 2]
    assert callback.history[0].num_samples == 5
    assert [step for step, _ in losses(trainer)] == [1, 2]


def test_a_probe_or_where_one_was_saved_takes_the_place_of_the_folders(tmp_path, folders):
    probe = Probe.from_folders(**folders, num_samples=4)
    for given in (probe, probe.save(tmp_path / "probe.zip")):
        trainer = make_trainer(tmp_path / "run")
        assert attach_mir(trainer, probe=given).probe == probe


def test_the_words_of_the_flags_name_a_stop_rule(tmp_path, folders):
    for word, rule in (("plateau", PlateauRule()), ("observe", PlateauRule(observe_only=True)), ("none", None)):
        assert attach_mir(make_trainer(tmp_path), **folders, num_samples=4, stop=word).config.stop == rule
    with pytest.raises(ConfigError, match="stop.*'soon'"):
        attach_mir(make_trainer(tmp_path), **folders, num_samples=4, stop="soon")


def test_a_draw_beside_a_probe_is_refused(tmp_path, folders):
    probe = Probe.from_folders(**folders, num_samples=4)
    with pytest.raises(ConfigError, match="num_samples and seed"):
        attach_mir(make_trainer(tmp_path), probe=probe, num_samples=3, seed=1)


def test_an_unknown_model_is_refused_with_what_is_known(folders):
    trainer = SimpleNamespace(model=torch.nn.Linear(2, 2), callback_handler=SimpleNamespace(callbacks=[]))
    with pytest.raises(UnsupportedModelError, match="Linear.*asked: llava_integration.llava"):
        attach_mir(trainer, **folders)


def test_errors_name_what_is_wrong_before_training(tmp_path, folders):
    trainer = make_trainer(tmp_path / "run")
    with pytest.raises(ProbeError, match="num_samples=100.* 6 "):
        attach_mir(trainer, **folders)
    with pytest.raises(ConfigError, match="prompt='v1'.* LlavaForConditionalGeneration"):
        attach_mir(trainer, **folders, num_samples=5, prompt="v1")
    with pytest.raises(ConfigError, match="int is not a transformers Trainer"):
        attach_mir(3, **folders)
    for given, message in (
        ({}, "No probe given"),
        ({"images": "i"}, "both images and texts: images='i'"),
        ({**folders, "probe": "p.zip"}, "either a probe, or images and texts"),
    ):
        with pytest.raises(ConfigError, match=message):
            attach_mir(trainer, **given)
    trainer.processing_class = None
    with pytest.raises(ConfigError, match="Found no processor"):
        attach_mir(trainer, **folders, num_samples=5)
