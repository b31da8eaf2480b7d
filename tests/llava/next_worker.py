# SPDX-License-Identifier: Apache-2.0
"""Our value on real LLaVA-NeXT models beside the published procedure on its own training code's inputs.

`python -m tests.llava.next_worker FOLDER ASSETS`: the inputs of the procedure come from functions of llava.train.train
(conversation, image and batch as in training), one sample at a time; all hidden states are kept, the positions of the
image counted from the placeholder's index, everything after it text, float32 states; the root in float64.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from llava import conversation as conversations
from llava.constants import IMAGE_TOKEN_INDEX
from llava.model import LlavaLlamaForCausalLM, LlavaMixtralForCausalLM, LlavaQwenForCausalLM
from llava.train.train import DataCollatorForSupervisedDataset, LazySupervisedDataset, preprocess
from PIL import Image
from transformers import AutoTokenizer

from llava_integration import LlavaNextAdapter
from mir_callback import Probe, evaluate_mir
from mir_callback.probe.adapters import find_adapter
from tests import reference
from tests.distributed.launch import write_rank
from tests.llava.next_assets import SIGLIP
from tests.llava.next_cases import CASES

Image.ANTIALIAS = Image.LANCZOS  # left Pillow in version 10; llava.mm_utils uses it for "crop_split"
LANGUAGE_MODELS = {
    "qwen": ("tiny-qwen", LlavaQwenForCausalLM),
    "llama": ("tiny-vicuna", LlavaLlamaForCausalLM),
    "mixtral": ("tiny-mixtral", LlavaMixtralForCausalLM),
}


def make_model(assets: Path, language: str, tower: str, overrides: dict[str, Any]) -> tuple[Any, Any]:
    """A tiny LLaVA-NeXT as the training script sets it up, with other configuration values."""
    torch.manual_seed(0)
    folder, kind = LANGUAGE_MODELS[language]
    tokenizer = AutoTokenizer.from_pretrained(assets / folder, use_fast=language == "qwen", model_max_length=8192)
    if tokenizer.unk_token is not None:
        tokenizer.pad_token = tokenizer.unk_token
    model = kind.from_pretrained(assets / folder)
    side = 384 if tower == "siglip" else 32
    arguments = SimpleNamespace(
        vision_tower=SIGLIP if tower == "siglip" else str((assets / "tiny-clip-vit").absolute()),
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        pretrain_mm_mlp_adapter=None,
        mm_patch_merge_type=overrides.get("mm_patch_merge_type", "flat"),
        mm_projector_type=overrides.get("mm_projector_type", "mlp2x_gelu"),
        mm_use_im_patch_token=False,
        mm_use_im_start_end=overrides.get("mm_use_im_start_end", False),
        tune_mm_mlp_adapter=False,
        add_faster_video=False,
    )
    model.get_model().initialize_vision_modules(arguments)
    defaults = {
        "image_aspect_ratio": "square",
        "image_grid_pinpoints": [[side, 2 * side], [2 * side, side], [2 * side, 2 * side]],
        "image_crop_resolution": 2 * side,
        "image_split_resolution": side,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 8192,
        "mm_use_im_start_end": False,
        "mm_newline_position": "grid",
    }
    for name, value in {**defaults, **overrides}.items():
        setattr(model.config, name, value)
    model.initialize_vision_tokenizer(arguments, tokenizer)
    return model.eval(), tokenizer


def training_batch(model: Any, tokenizer: Any, sample: Any) -> dict[str, Any]:
    """One sample as llava.train.train makes it: conversation, image, batch of one; without labels."""
    data = SimpleNamespace(image_processor=model.get_vision_tower().image_processor, **vars(model.config))
    data.is_multimodal = True
    turns = [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": sample.text}]
    if model.config.mm_use_im_start_end:
        turns[0]["value"] = "<im_start><image><im_end>\n"
    ids = preprocess([turns], tokenizer, has_image=True)
    with tempfile.TemporaryDirectory() as folder:
        sample.open_image().save(Path(folder) / "image.png")
        data.image_folder = folder
        image = LazySupervisedDataset.process_image(SimpleNamespace(data_args=data), "image.png")
    instance = {"input_ids": ids["input_ids"][0], "labels": ids["labels"][0], "image": [image]}
    batch: dict[str, Any] = DataCollatorForSupervisedDataset(tokenizer)([instance])
    del batch["labels"]
    return batch


@torch.no_grad()
def step_by_step(model: Any, tokenizer: Any, probe: Probe) -> tuple[float, int]:
    """MIR as the authors' script computes it, with an exact root; and the number of vision tokens."""
    vision, text = [], []
    for sample in probe.samples:
        batch = training_batch(model, tokenizer, sample)
        ids = batch["input_ids"][0]
        states = model(**batch, output_hidden_states=True).hidden_states
        start = int((ids == IMAGE_TOKEN_INDEX).nonzero())
        end = start + states[0].shape[1] - (len(ids) - 1)
        vision.append([state[0, start:end] for state in states[1:]])
        text.append([state[0, end:] for state in states[1:]])
    stacked = [[torch.cat(layer) for layer in zip(*rows)] for rows in (vision, text)]  # noqa: B905
    return reference.rate(*stacked)[0], len(stacked[0][0])


def measure(assets: Path, case: tuple[str, str, str, dict[str, Any]], probe: Probe) -> dict[str, Any]:
    """Both values of one case, ours at several batch sizes."""
    language, tower, template, overrides = case
    conversations.default_conversation = conversations.conv_templates[template]
    model, tokenizer = make_model(assets, language, tower, overrides)
    adapter = find_adapter(model, tokenizer)
    assert isinstance(adapter, LlavaNextAdapter)
    ours = [evaluate_mir(model, probe, adapter=adapter, batch_size=size) for size in (1, 3, 6)]
    expected, vision_tokens = step_by_step(model, tokenizer, probe)
    return {
        "ours": [report.mir for report in ours],
        "authors": expected,
        "vision_tokens": [*(report.num_vision_tokens for report in ours), vision_tokens],
        "text_tokens": ours[0].num_text_tokens,
    }


def main(folder: str, assets: str, *wanted: str) -> None:
    """Measure every case, or those whose name contains a wanted word, and write the values."""
    probe = Probe.from_folders(Path(assets) / "probe" / "images", Path(assets) / "probe" / "texts", num_samples=6)
    found = {}
    for name, case in CASES.items():
        if not wanted or any(word in name for word in wanted):
            found[name] = measure(Path(assets), case, probe)
            print(name, found[name], flush=True)
    write_rank(folder, 0, found)


if __name__ == "__main__":
    main(*sys.argv[1:])
