# SPDX-License-Identifier: Apache-2.0
"""Runs of the stock Trainer in many set-ups, each the same to the last bit with and without the callback.

One process; tests/distributed has DDP and ZeRO. What is compared: every logged loss, gradient norm and learning rate,
the final weights, the optimizer's state, and where the random streams of Python, NumPy and torch stand afterwards.
"""

import itertools
import random
import tempfile
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, Trainer

from mir_callback import MIRCallback, Probe, evaluate_mir
from mir_callback.model.isolation import preserve_training_state
from tests.reference import hidden_rows, rate
from tests.samples import pairs
from tests.training.runs import make_trainer, optimizer_state, weights


@pytest.fixture(scope="module")
def probe():
    return Probe.from_pairs(pairs(5), matched=True)


def freeze_tower(trainer):
    """As LLaVA's stage 1 does: only the projector trains, the tower stays in evaluation mode."""
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad = "multi_modal_projector" in name
    tower = next(module for name, module in trainer.model.named_modules() if name.endswith("vision_tower"))
    tower.eval()
    tower.train = lambda mode=True: tower


def adapted(model, **options):
    """LoRA with dropout of its own."""
    torch.manual_seed(11)
    return get_peft_model(model, LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"], **options))


def quantised(model, **options):
    """QLoRA: the weights quantised as bitsandbytes does when it loads them, and adapters on them."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = BitsAndBytesConfig(**options)
        loaded = type(model).from_pretrained(folder, quantization_config=config, device_map="cpu")
    return adapted(prepare_model_for_kbit_training(loaded))


def run_out_of_memory(trainer):
    """Once, in the second step; the Trainer begins anew with half the batch."""
    compute, calls = trainer.compute_loss, itertools.count()

    def compute_loss(*args, **kwargs):
        if next(calls) == 3:
            raise RuntimeError("CUDA out of memory.")
        return compute(*args, **kwargs)

    trainer.compute_loss = compute_loss


def group_by_length(trainer):
    """Give the sampler a dataset that knows its lengths."""
    items, collate = trainer.train_dataset, trainer.data_collator
    lengths = [len(text) for _, text in (items[index] for index in range(len(items)))]
    trainer.train_dataset = datasets.Dataset.from_dict({"index": list(range(len(items))), "length": lengths})
    trainer.data_collator = lambda rows: collate([items[row["index"]] for row in rows])


def nothing(trainer):
    """Leave the trainer as it is."""


SETUPS = {
    "float32, dropout, accumulation": ({}, nothing),
    "bfloat16 autocast": ({"bf16": True}, nothing),
    "gradient checkpointing": ({"gradient_checkpointing": True}, nothing),
    "gradient checkpointing, reentrant": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        nothing,
    ),
    "grouped by length": ({"train_sampling_strategy": "group_by_length"}, group_by_length),
    "dataloader workers": ({"dataloader_num_workers": 2, "dataloader_persistent_workers": True}, nothing),
    "frozen tower in evaluation mode": ({}, freeze_tower),
    "PEFT": ({"wrap": adapted}, nothing),
    "DoRA": ({"wrap": partial(adapted, use_dora=True)}, nothing),
    "modules_to_save": ({"wrap": partial(adapted, modules_to_save=["multi_modal_projector"])}, nothing),
    "QLoRA, nf4": ({"wrap": partial(quantised, load_in_4bit=True, bnb_4bit_quant_type="nf4")}, nothing),
    "QLoRA, 8 bit": ({"wrap": partial(quantised, load_in_8bit=True)}, nothing),
    "NEFTune": ({"neftune_noise_alpha": 5.0}, nothing),
    "automatic batch size": ({"auto_find_batch_size": True}, run_out_of_memory),
    "evaluation on start": ({"eval_on_start": True, "eval_strategy": "steps", "evaluated": 2}, nothing),
    "schedule-free optimizer": ({"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}, nothing),
    "saving in between": ({"save_strategy": "steps", "save_steps": 2}, nothing),
}


def run(folder, options, prepare, probe=None):
    """Train, and everything that must not differ."""
    random.seed(4)
    np.random.seed(4)
    trainer = make_trainer(folder, steps=4, dropout=0.2, **options)
    prepare(trainer)
    gain = {"vision_gain": not options or "bf16" in options}  # in some of the set-ups
    callback = MIRCallback(probe, every=1, batch_size=2, **gain).attach(trainer) if probe else None
    trainer.train()
    return {
        "callback": callback,
        "trainer": trainer,
        "log": [
            (entry["step"], entry["loss"], entry.get("grad_norm"), entry["learning_rate"])
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
        "weights": weights(trainer),
        "optimizer": optimizer_state(trainer.optimizer),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
        "flags": {name: module.training for name, module in trainer.model.named_modules()},
    }


SLOW = ("DoRA", "modules_to_save", "NEFTune", "evaluation on start", "automatic batch size")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in SETUPS])
def test_training_is_the_same_to_the_last_bit(tmp_path, probe, name):
    options, prepare = SETUPS[name]
    plain = run(tmp_path / "plain", options, prepare)
    watched = run(tmp_path / "watched", options, prepare, probe)
    assert [step for step, *_ in plain["log"]] == [1, 2, 3, 4]
    assert len({loss for _, loss, *_ in plain["log"]}) == 4
    assert [record.step for record in watched["callback"].history] == [0, 1, 2, 3, 4]
    assert all(record.mir is not None for record in watched["callback"].history)
    gains = {record.vision_gain is not None for record in watched["callback"].history}
    assert gains == {not options or "bf16" in options}
    if not {"bf16", "optim"} & options.keys():  # those are measured under autocast, and at other weights
        trainer = watched["trainer"]
        with preserve_training_state(trainer.model):
            rows = hidden_rows(trainer.model, trainer.processing_class, pairs(5))
        assert watched["callback"].history[-1].mir == pytest.approx(rate(*rows)[0], abs=1e-5)
    for field in ("log", "random", "flags"):
        assert watched[field] == plain[field], field
    for field in ("weights", "optimizer"):
        assert plain[field].keys() == watched[field].keys()
        differing = [key for key, value in plain[field].items() if not torch.equal(value, watched[field][key])]
        assert not differing, field


def test_a_schedule_free_run_is_measured_at_the_weights_it_would_save(tmp_path, probe):
    options, _ = SETUPS["schedule-free optimizer"]
    watched = run(tmp_path, options, nothing, probe)
    trainer = watched["trainer"]
    last = watched["callback"].history[-1].mir

    training = evaluate_mir(trainer.model, probe, processor=trainer.processing_class, batch_size=2).mir
    trainer.optimizer.eval()
    averaged = evaluate_mir(trainer.model, probe, processor=trainer.processing_class, batch_size=2).mir
    assert last == pytest.approx(averaged, abs=1e-7)
    assert abs(last - training) > 1e-4


def test_the_comparison_sees_a_single_draw_of_random_numbers(tmp_path, probe):
    plain = run(tmp_path / "plain", {}, nothing)

    def draw_once(trainer: Trainer) -> None:
        torch.rand(1)

    disturbed = run(tmp_path / "disturbed", {}, draw_once)
    assert disturbed["log"] != plain["log"]
