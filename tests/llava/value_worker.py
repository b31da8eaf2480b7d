# SPDX-License-Identifier: Apache-2.0
"""Our value beside the procedure of the authors' script followed step by step: `value_worker FOLDER ASSETS`.

The procedure (Modality-Integration-Rate/mir.py, written anew): one sample at a time, all hidden states kept, positions
of the image counted from the placeholder's index, everything after it text, float32 states; the root in float64.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model import LlavaLlamaForCausalLM, LlavaMistralForCausalLM
from PIL import Image
from transformers import LlamaTokenizer

from llava_integration import OriginalLlavaAdapter
from llava_integration.common import spliced_masks
from mir_callback import Probe, evaluate_mir
from tests import reference
from tests.distributed.launch import write_rank
from tests.llava.value_cases import CASES, IMAGE_MODES, LANGUAGE_MODEL, VISION_TOWER, templates_of
from tests.samples import pairs


def make_model(assets: Path, overrides: dict[str, Any]) -> tuple[Any, Any]:
    """The tiny LLaVA as the training script sets it up, with other configuration values."""
    torch.manual_seed(0)
    language_model = assets / overrides.get(LANGUAGE_MODEL, "tiny-vicuna")
    tokenizer = LlamaTokenizer.from_pretrained(language_model)
    tokenizer.pad_token = tokenizer.unk_token
    kind = LlavaMistralForCausalLM if "mistral" in language_model.name else LlavaLlamaForCausalLM
    model = kind.from_pretrained(language_model)
    arguments = SimpleNamespace(
        vision_tower=str((assets / overrides.get(VISION_TOWER, "tiny-clip-vit")).absolute()),
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        pretrain_mm_mlp_adapter=None,
        mm_patch_merge_type=overrides.get("mm_patch_merge_type", "flat"),
        mm_projector_type=overrides.get("mm_projector_type", "mlp2x_gelu"),
        mm_use_im_patch_token=False,
        mm_use_im_start_end=overrides.get("mm_use_im_start_end", False),
        tune_mm_mlp_adapter=False,
    )
    model.get_model().initialize_vision_modules(arguments)
    model.config.image_grid_pinpoints = [[32, 64], [64, 32], [64, 64]]
    defaults = {"image_aspect_ratio": "square", "tokenizer_padding_side": "right", "mm_use_im_start_end": False}
    for name, value in {**defaults, **overrides}.items():
        if name not in (LANGUAGE_MODEL, VISION_TOWER):
            setattr(model.config, name, value)
    model.initialize_vision_tokenizer(arguments, tokenizer)
    return model.eval(), tokenizer


@torch.no_grad()
def authors_procedure(model: Any, tokenizer: Any, probe: Probe, template: str) -> float:
    """MIR as the authors' script computes it, with an exact root."""
    vision, text = [], []
    for sample in probe.samples:
        image = sample.open_image()
        pixels = process_images([image], model.get_vision_tower().image_processor, model.config)
        token = DEFAULT_IMAGE_TOKEN
        if model.config.mm_use_im_start_end:
            token = f"<im_start>{token}<im_end>"
        if template == "plain":
            prompt = f"{token}{sample.text}\n"
        else:
            conversation = conv_templates[template].copy()
            conversation.append_message(conversation.roles[0], f"{token}\n")
            conversation.append_message(conversation.roles[1], sample.text)
            prompt = conversation.get_prompt()
        ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
        states = model(ids, images=pixels, image_sizes=[image.size], output_hidden_states=True).hidden_states
        start = int((ids[0] == IMAGE_TOKEN_INDEX).nonzero())
        length = states[0].shape[1]
        full = getattr(model.config, "tokenizer_model_max_length", None)
        # Of a truncated sequence the number of image tokens can't be read off its length: here it is a grid of patches.
        count = 16 if full is not None and length == full else length - (ids.shape[1] - 1)
        vision.append([state[0, start : start + count] for state in states[1:]])
        text.append([state[0, start + count :] for state in states[1:]])
    stacked = [[torch.cat(layer) for layer in zip(*rows)] for rows in (vision, text)]  # noqa: B905
    return reference.rate(*stacked)[0]


@torch.no_grad()
def gain_by_labels(model: Any, tokenizer: Any, probe: Probe) -> dict[str, float]:
    """Our vision gain, and that of LLaVA's own loss with labels, one sample at a time with its and the next image."""
    totals, predicted = [0.0, 0.0], 0
    for index, sample in enumerate(probe.samples):
        ids = tokenizer_image_token(f"{DEFAULT_IMAGE_TOKEN}{sample.text}\n", tokenizer, return_tensors="pt")[None]
        labels = ids.clone()
        labels[0, : int((ids[0] == IMAGE_TOKEN_INDEX).nonzero()) + 2] = -100  # and the first token of the text
        count = int((labels != -100).sum())
        predicted += count
        for which in (0, 1):
            image = probe.samples[(index + which) % len(probe)].open_image()
            pixels = process_images([image], model.get_vision_tower().image_processor, model.config)
            loss = model(ids, images=pixels, image_sizes=[image.size], labels=labels).loss
            totals[which] += loss.item() * count
    adapter = OriginalLlavaAdapter(model, tokenizer, prompt="plain")
    ours = evaluate_mir(model, replace(probe, matched=True), adapter=adapter, batch_size=4, vision_gain=True)
    return {"ours": ours.vision_gain, "by labels": (totals[1] - totals[0]) / predicted}


def modes_probe(folder: Path) -> Probe:
    """A probe of image files in every colour mode that is read, one turned by its EXIF data."""
    folder.mkdir()
    texts = [text for _, text in pairs(9)]
    images = [image for image, _ in pairs(9)]
    for name, mode in (("grey", "L"), ("alpha", "RGBA"), ("palette", "P"), ("grey alpha", "LA"), ("bits", "1")):
        images.pop().convert(mode).save(folder / f"{name}.png")
    images.pop().convert("P").save(folder / "transparent palette.png", transparency=bytes(range(256)))
    images.pop().convert("CMYK").save(folder / "cmyk.jpg")
    images.pop().convert("YCbCr").save(folder / "luminance.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    images.pop().save(folder / "turned.jpg", exif=turned)
    for index, text in enumerate(texts):
        (folder / f"{index}.txt").write_text(text)
    return Probe.from_folders(folder, folder, num_samples=9)


def mixed_batch(model: Any, tokenizer: Any, probe: Probe) -> list[list[int]]:
    """Vision and text counts of a hand-made batch: two images, one image, none; (rows of counts)."""
    pictures = [sample.open_image() for sample in probe.samples[:4]]
    prompts = [f"{DEFAULT_IMAGE_TOKEN} and {DEFAULT_IMAGE_TOKEN} text", f"{DEFAULT_IMAGE_TOKEN} text", "text only"]
    rows = [tokenizer_image_token(prompt, tokenizer, return_tensors="pt") for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    attention = torch.zeros_like(ids, dtype=torch.bool)
    for index, row in enumerate(rows):
        attention[index, : len(row)] = True
    pixels = process_images(pictures, model.get_vision_tower().image_processor, model.config)
    with torch.no_grad(), spliced_masks(model, IMAGE_TOKEN_INDEX, every_sample=False) as current:
        model(ids, attention_mask=attention, images=pixels)
        masks = current()
    return [masks.vision.sum(dim=1).tolist(), masks.text.sum(dim=1).tolist(), [len(row) for row in rows]]


def compare(model: Any, tokenizer: Any, probe: Probe, template: str) -> dict[str, Any]:
    """Our value at several batch sizes, and the authors' procedure's."""
    adapter = OriginalLlavaAdapter(model, tokenizer, prompt=template)
    ours = [evaluate_mir(model, probe, adapter=adapter, batch_size=size).mir for size in (1, 4, 6)]
    return {"ours": ours, "authors": authors_procedure(model, tokenizer, probe, template)}


def written_out(model: Any, tokenizer: Any, probe: Probe, template: str) -> list[Any]:
    """A conversation as a format string, and whether that gives the same token ids."""
    named = OriginalLlavaAdapter(model, tokenizer, prompt=template)
    written = OriginalLlavaAdapter(model, tokenizer, prompt=named.prompt)
    rows = [adapter.encode(probe.samples, 1024).token_ids for adapter in (named, written)]
    return [named.prompt, all(torch.equal(one, other) for one, other in zip(*rows))]  # noqa: B905


def main(folder: str, assets: str) -> None:
    """Compute every case, at several batch sizes, and write the values."""
    probe = Probe.from_folders(Path(assets) / "probe" / "images", Path(assets) / "probe" / "texts", num_samples=6)
    values: dict[str, Any] = {}
    for name, overrides in CASES.items():
        model, tokenizer = make_model(Path(assets), overrides)
        for template in templates_of(name):
            values[f"{name}, {template}"] = compare(model, tokenizer, probe, template)
    modes = modes_probe(Path(folder) / "modes")
    found = {name: compare(*make_model(Path(assets), CASES[name]), modes, "plain") for name in IMAGE_MODES}
    mixed = mixed_batch(*make_model(Path(assets), {}), probe)
    tried = ("plain", "vicuna_v1", "llama_2")
    written = {name: written_out(*make_model(Path(assets), {}), probe, name) for name in tried}
    spread = make_model(Path(assets), CASES["anyres, spatial_unpad"])  # other images, other numbers of tokens
    gain = gain_by_labels(*spread, probe)
    write_rank(folder, 0, {"values": values, "modes": found, "mixed": mixed, "written": written, "gain": gain})


if __name__ == "__main__":
    main(*sys.argv[1:])
