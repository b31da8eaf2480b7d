# SPDX-License-Identifier: Apache-2.0
"""MIR of real TinyLLaVA models, ours beside a procedure of single steps: `tinyllava_values FOLDER`, by hand.

Wants a TinyLLaVA Factory checkout on PYTHONPATH, see benchmarks/notes/integrations.md. The procedure: TinyLLaVA's own
data set makes the inputs, one sample at a time goes through the model with all hidden states kept, the image stands
where -200 stood, everything after it is text; root in float64.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests.llava.tinyllava_checkout import help_on_cpu, help_on_newer_python

help_on_newer_python()
help_on_cpu()

from tinyllava.data.dataset import DataCollatorForSupervisedDataset, LazySupervisedDataset  # noqa: E402
from tinyllava.model import TinyLlavaConfig, TinyLlavaForConditionalGeneration  # noqa: E402

from llava_integration import TinyLlavaAdapter  # noqa: E402
from mir_callback import Probe, evaluate_mir  # noqa: E402
from tests import reference  # noqa: E402
from tests.llava import tinyllava_assets  # noqa: E402
from tests.samples import pairs  # noqa: E402

TEMPLATES = {"tinyllama": ("pretrain", "llama"), "tiny-phi": ("pretrain", "phi")}
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"image_aspect_ratio": "pad"},
    {"tokenizer_padding_side": "left"},
    {"connector_type": "linear"},
    {"mm_vision_select_feature": "cls_patch"},
)
COUNT = 6


def make_model(assets: Path, language_model: str, changes: dict[str, Any]) -> Any:
    """A model as the training script makes it, without a recipe."""
    torch.manual_seed(0)
    config = TinyLlavaConfig()
    arguments = {
        "model_name_or_path": str(assets / language_model),
        "vision_tower": str(assets / "tiny-clip-vit"),
        "vision_tower2": "",
        "connector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": "square",
        "model_max_length": 400,
    }
    config.load_from_config(SimpleNamespace(**{**arguments, **changes}))
    model = TinyLlavaForConditionalGeneration(config)
    model.load_llm(model_name_or_path=arguments["model_name_or_path"], torch_dtype=torch.float32)
    model.load_vision_tower(model_name_or_path=arguments["vision_tower"])
    model.load_connector()
    return model.eval()


def write_data(folder: Path) -> Path:
    """The probe's pairs as TinyLLaVA's training data."""
    records = []
    for index, (image, text) in enumerate(pairs(COUNT, seed=2)):
        image.save(folder / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": text}]
        records.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    path = folder / "probe.json"
    path.write_text(json.dumps(records))
    return path


def training_batches(model: Any, data: Path, template: str) -> list[dict[str, Any]]:
    """The same samples as TinyLLaVA's training reads them, one a batch."""
    arguments = SimpleNamespace(
        conv_version=template,
        image_processor=model.vision_tower._image_processor,
        image_aspect_ratio=model.config.image_aspect_ratio,
        image_folder=str(data.parent),
        is_multimodal=True,
    )
    dataset = LazySupervisedDataset(str(data), model.tokenizer, arguments)
    collate = DataCollatorForSupervisedDataset(model.tokenizer)
    return [collate([dataset[index]]) for index in range(len(dataset))]


@torch.no_grad()
def single_steps(model: Any, batches: list[dict[str, Any]]) -> float:
    """MIR of those batches."""
    vision, text = [], []
    for batch in batches:
        del batch["labels"]
        states = model(**batch, output_hidden_states=True).hidden_states[1:]
        ids = batch["input_ids"][0]
        start = int((ids == -200).nonzero())
        count = states[0].shape[1] - (len(ids) - 1)
        vision.append([state[0, start : start + count] for state in states])
        text.append([state[0, start + count :] for state in states])
    stacked = [[torch.cat(layer) for layer in zip(*rows)] for rows in (vision, text)]  # noqa: B905
    return reference.rate(*stacked)[0]


def main(folder: Path) -> None:
    """Every case: are inputs those of training, and how far are the values from the procedure?"""
    tinyllava_assets.build(folder / "assets")
    data = write_data(folder)
    probe = Probe.from_pairs(pairs(COUNT, seed=2))
    worst = 0.0
    for language_model, templates in TEMPLATES.items():
        for changes in CHANGES:
            model = make_model(folder / "assets", language_model, changes)
            for template in templates:
                adapter = TinyLlavaAdapter(model, model.tokenizer, prompt=template)
                encoded = adapter.encode(probe.samples, probe.max_text_tokens)
                batches = training_batches(model, data, template)
                same = all(
                    torch.equal(ids, batch["input_ids"][0]) and torch.equal(image, batch["images"][0])
                    for ids, image, batch in zip(encoded.token_ids, encoded.inputs["images"], batches, strict=True)
                )
                ours = [evaluate_mir(model, probe, adapter=adapter, batch_size=size).mir for size in (1, 4, COUNT)]
                expected = single_steps(model, batches)
                difference = max(abs(value - expected) for value in ours)
                worst = max(worst, difference)
                case = ", ".join([language_model, template, *map(str, changes.values())])
                print(f"[values] {case}: MIR {expected:.6f}, off by {difference:.1e}, inputs as in training: {same}")
    print(f"[values] largest difference {worst:.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
