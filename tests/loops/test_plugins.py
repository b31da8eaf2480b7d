# SPDX-License-Identifier: Apache-2.0
"""Plug-ins for ms-swift and axolotl, called as those packages call them; what was run with the packages is in the note.

benchmarks/notes/integrations.md has the versions.
"""

import importlib
import logging
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
from transformers import Trainer

from mir_callback import MIRCallback, Probe, evaluate_mir
from mir_callback.errors import ConfigError
from tests import tiny_models
from tests.logs import logged_here
from tests.samples import pairs
from tests.training.runs import make_trainer


@pytest.fixture
def probe():
    return Probe.from_pairs(pairs(4))


def put_module(monkeypatch, name, **content):
    for parent in (name.partition(".")[0], name):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    vars(sys.modules[name]).update(content)


def mir_of_untrained(probe):
    model, processor = tiny_models.llava(dropout=0.1)
    return evaluate_mir(model, probe, processor=processor).mir


class Template:
    """swift's: has the processor, and a hook that makes embeddings of a batch in training."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.hook()

    def hook(self):
        def encode(module, args, kwargs):
            return args, {**kwargs, "pixel_values": kwargs["pixel_values"] * 0.5}

        self.handle = self.model.register_forward_pre_hook(encode, with_kwargs=True)

    @contextmanager
    def generate_context(self):
        self.handle.remove()
        try:
            yield
        finally:
            self.hook()


def test_swift_measures_what_its_template_does_not_touch(tmp_path, monkeypatch, probe):
    callbacks_map = {}
    put_module(monkeypatch, "swift.callbacks", callbacks_map=callbacks_map)
    from mir_callback.integrations.swift import register_mir

    register_mir(probe, every=1)
    ready = make_trainer(tmp_path, steps=2)

    class SwiftTrainer(Trainer):
        def __init__(self, args):
            self.template = Template(ready.model, ready.processing_class)
            super().__init__(
                model=ready.model,
                args=args,
                train_dataset=ready.train_dataset,
                data_collator=ready.data_collator,
                processing_class=ready.processing_class.tokenizer,
                callbacks=[callbacks_map["mir"](args, self)],
            )

    trainer = SwiftTrainer(ready.args)
    callback = trainer.callback_handler.callbacks[-1]  # behind the progress bar
    trainer.train()
    assert [each["step"] for each in trainer.state.log_history if "mir" in each] == [0, 1, 2]
    assert callback.history[0].mir == pytest.approx(mir_of_untrained(probe), abs=1e-7)
    with trainer.template.generate_context():
        trained = evaluate_mir(trainer.model, probe, processor=ready.processing_class)
    assert callback.history[-1].mir == pytest.approx(trained.mir, abs=1e-7)
    assert len(ready.model._forward_pre_hooks) == 1  # swift's own is back


def test_swift_gets_an_error_when_its_plugin_is_read(monkeypatch):
    put_module(monkeypatch, "swift.callbacks", callbacks_map={})
    from mir_callback.integrations.swift import register_mir

    with pytest.raises(ConfigError, match="'interval'"):
        register_mir("probe.zip", interval=50)


@pytest.fixture
def plugin(monkeypatch):
    """As axolotl finds it, by the name in a YAML file."""
    put_module(monkeypatch, "axolotl.integrations.base", BasePlugin=object)
    monkeypatch.delitem(sys.modules, "mir_callback.integrations.axolotl", raising=False)
    return importlib.import_module("mir_callback.integrations.axolotl").MIRPlugin()


class OthersWarnings(logging.Filter):
    """Axolotl's, for the loggers of others."""

    def filter(self, record):
        return record.levelno >= logging.WARNING


OthersWarnings.__module__ = "axolotl.logging_config"


def test_axolotl_measures_with_the_options_of_its_yaml(tmp_path, probe, plugin):
    module, _, name = plugin.get_input_args().rpartition(".")
    probe.save(tmp_path / "probe.zip")
    yaml = {"mir": {"probe": str(tmp_path / "probe.zip"), "every": 1}}
    cfg = getattr(importlib.import_module(module), name)(**yaml)
    trainer = make_trainer(tmp_path / "run", steps=2)
    processor, collate = trainer.processing_class, trainer.data_collator
    trainer.processing_class = processor.tokenizer

    class Collator:
        processing_strategy = SimpleNamespace(processor=processor)

        def __call__(self, rows):
            return collate(rows)

    trainer.data_collator = Collator()
    logger = logging.getLogger("mir_callback")
    logger.addFilter(OthersWarnings())
    for callback in plugin.add_callbacks_post_trainer(cfg, trainer):
        trainer.add_callback(callback)
    (callback,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, MIRCallback))
    with logged_here(logging.INFO) as messages:
        trainer.train()
    assert [record.step for record in callback.history] == [0, 1, 2]
    assert callback.history[0].mir == pytest.approx(mir_of_untrained(probe), abs=1e-9)
    assert any("step 2: MIR" in message for message in messages)


def test_axolotl_gets_an_error_without_a_probe(plugin):
    with pytest.raises(ConfigError, match="`mir:`"):
        plugin.add_callbacks_post_trainer(SimpleNamespace(mir=None), SimpleNamespace())
