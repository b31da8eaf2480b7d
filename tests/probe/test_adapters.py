# SPDX-License-Identifier: Apache-2.0
"""Which adapter a model gets: of transformers' own, LLaVA's code bases, somebody else's, or none."""

import sys

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import llava_integration
from mir_callback.errors import ConfigError, UnsupportedModelError
from mir_callback.probe import adapters
from mir_callback.probe.adapters import HuggingFaceAdapter, find_adapter, package_of, register_adapter
from tests import tiny_models
from tests.llava import tinyllava_stand_in
from tests.logs import logged


class Adapter:
    """Of a third party; nothing is encoded here."""

    def __init__(self, name):
        self.name = name


def factory_of(name, kind):
    def make(model, processor, *, prompt, trainer):
        return Adapter(f"{name} {processor} {prompt} {trainer}") if isinstance(model, kind) else None

    return make


class Theirs(nn.Module):
    def forward(self, x):
        return x


def built_by_others(**attributes):
    """A model and its processor; the model's class has a forward of its own and derives from one of transformers."""
    model, processor = tiny_models.llava()
    forward = type(model).forward
    own = {"__module__": __name__, "forward": lambda self, *args, **keywords: forward(self, *args, **keywords)}
    model.__class__ = type("Built", (type(model),), {**own, **attributes})
    return model, processor


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """As in a fresh process, but for what llava_integration has registered."""
    monkeypatch.setattr(adapters, "_registered", [])
    adapters._load_entry_points.cache_clear()
    yield
    adapters._load_entry_points.cache_clear()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package with an entry point, as pip would."""

    def make(value, source=""):
        (tmp_path / "their_package.py").write_text(source)
        info = tmp_path / "their_package-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[mir_callback.adapters]\ntheirs = {value}\n")
        monkeypatch.syspath_prepend(tmp_path)

    yield make
    sys.modules.pop("their_package", None)


def test_a_registered_factory_is_asked_with_all_that_is_known():
    register_adapter(factory_of("a", Theirs))
    found = find_adapter(Theirs(), 7, prompt="v1", trainer="trainer")
    assert found.name == "a 7 v1 trainer"


def test_the_factory_registered_last_is_asked_first_and_a_fallback_last(monkeypatch):
    monkeypatch.setattr(adapters, "_fallbacks", [])
    for name, fallback in (("first", False), ("second", False), ("fallback", True)):
        register_adapter(factory_of(name, Theirs), fallback=fallback)
    assert find_adapter(Theirs(), None).name.startswith("second")
    register_adapter(factory_of("elsewhere", nn.Conv2d))
    assert find_adapter(Theirs(), None).name.startswith("second")
    monkeypatch.setattr(adapters, "_registered", [])
    assert find_adapter(Theirs(), None).name.startswith("fallback")


def test_a_registered_factory_goes_before_those_of_transformers_and_llava(monkeypatch):
    tinyllava_stand_in.install(monkeypatch)
    for model in (tiny_models.llava()[0], tinyllava_stand_in.TinyLlavaForConditionalGeneration()):
        register_adapter(factory_of("ours", type(model)))
        assert find_adapter(model, None).name.startswith("ours")


def test_an_installed_package_brings_its_factory(install):
    source = "class A:\n    pass\n\ndef make(model, processor, *, prompt, trainer):\n    return A()"
    install("their_package:make", source)
    assert type(find_adapter(Theirs(), None)).__module__ == "their_package"
    register_adapter(factory_of("registered", Theirs))
    assert isinstance(find_adapter(Theirs(), None), Adapter)


def test_a_broken_package_is_said_and_does_not_stand_in_the_way(install):
    install("their_package:missing")
    model, processor = tiny_models.llava()
    with logged(r"adapters of their_package:missing: AttributeError"):
        assert isinstance(find_adapter(model, processor), HuggingFaceAdapter)


def test_llava_integration_is_imported_by_name_when_a_model_is_none_of_transformers(monkeypatch):
    tinyllava_stand_in.install(monkeypatch)
    monkeypatch.setattr(adapters, "_fallbacks", [])
    for name in [name for name in sys.modules if name.partition(".")[0] == "llava_integration"]:
        monkeypatch.delitem(sys.modules, name)
    find_adapter(*tiny_models.llava())
    assert "llava_integration" not in sys.modules
    found = find_adapter(tinyllava_stand_in.TinyLlavaForConditionalGeneration(), None)
    assert type(found).__name__ == "TinyLlavaAdapter"


def test_an_unknown_model_is_refused_with_who_was_asked_and_what_to_do(monkeypatch):
    with pytest.raises(UnsupportedModelError) as caught:
        find_adapter(Theirs(), None)
    message = str(caught.value)
    assert f"{__name__}.Theirs" in message
    assert "asked: llava_integration.llava, llava_integration.tinyllava" in message
    assert "register_adapter" in message
    monkeypatch.setitem(sys.modules, "llava_integration", None)
    monkeypatch.setattr(adapters, "_fallbacks", [])
    with pytest.raises(UnsupportedModelError, match="asked: none; llava_integration could not be imported: import of"):
        find_adapter(Theirs(), None)


def test_a_model_built_like_those_of_transformers_gets_their_adapter():
    model, processor = built_by_others()
    assert package_of(model) == "tests"
    assert isinstance(find_adapter(model, processor), HuggingFaceAdapter)
    with pytest.raises(UnsupportedModelError, match="no adapter for .*Built"):
        find_adapter(model, processor.tokenizer)
    model.config = LlamaConfig()  # names no image token
    with pytest.raises(UnsupportedModelError, match="no adapter for .*Built"):
        find_adapter(model, processor)


def test_a_model_that_splices_images_in_as_llava_does_is_not_taken_for_one_of_transformers():
    model, processor = built_by_others(prepare_inputs_labels_for_multimodal=None)
    with pytest.raises(UnsupportedModelError, match="no adapter for .*Built"):
        find_adapter(model, processor)


def test_a_text_only_model_is_told_that_it_has_no_vision_tokens_and_not_that_it_lacks_a_processor():
    model, processor = tiny_models.llava()
    text_only = LlamaForCausalLM(model.config.text_config)
    for given in (None, processor.tokenizer, processor):
        with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no vision tokens"):
            find_adapter(text_only, given)


def test_a_template_for_a_model_of_transformers_is_refused():
    model, processor = tiny_models.llava()
    with pytest.raises(ConfigError, match="prompt='v1'.* LlavaForConditionalGeneration"):
        find_adapter(model, processor, prompt="v1")
    with pytest.raises(ConfigError, match="TokenizersBackend|PreTrainedTokenizerFast"):
        find_adapter(model, processor.tokenizer)
    with pytest.raises(ConfigError, match="model .* int"):
        find_adapter(3, processor)


def test_a_models_package_is_that_of_the_forward_it_runs():
    model, _ = tiny_models.llava()
    assert package_of(torch.nn.parallel.DataParallel(model)) == "transformers"
    sharded = type(f"FSDP{type(model).__name__}", (type("FSDPModule", (), {}), type(model)), {})
    model.__class__ = sharded  # as torch's fully_shard does
    assert package_of(model) == "transformers"
    assert package_of(Theirs()) == "tests"


def test_attach_mir_is_one_function():
    import mir_callback

    assert llava_integration.attach_mir is mir_callback.attach_mir
