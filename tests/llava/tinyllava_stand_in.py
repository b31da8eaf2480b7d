# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the package `tinyllava` (TinyLLaVA Factory), which no index has.

Written anew, with the behaviours of commit 53f12c7804102104d54064102b5d2139343e59c5 that the adapter meets: image
processor and tokenizer inside the model, one feature block for each -200 in place of it, padding dropped and made anew,
truncation after that, `language_model.forward` called directly, templates by name with an AssertionError for unknown
ones, a collator that finds padding by its id. The real package: benchmarks/notes/integrations.md.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM, PretrainedConfig

from tests import tiny_models

COMMIT = "53f12c7804102104d54064102b5d2139343e59c5"
PLACEHOLDER, IGNORED = -200, -100


class Config(PretrainedConfig):
    model_type = "tinyllava-stand-in"

    def __init__(self, text_config: Any = None, **values: Any) -> None:
        self.text_config = text_config
        self.hidden_size = getattr(text_config, "hidden_size", None)
        super().__init__(**values)


class TinyLlavaForConditionalGeneration(nn.Module):
    """CLIP, MLP and Llama of tests/tiny_models, put together as TinyLLaVA does."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        source, processor = tiny_models.llava()
        torch.manual_seed(0)
        self.config = Config(
            source.config.text_config,
            **{
                "image_aspect_ratio": "square",
                "tokenizer_padding_side": "right",
                "tokenizer_model_max_length": 200,
                **changes,
            },
        )
        self.language_model = LlamaForCausalLM(source.config.text_config)
        self.vision_tower = source.model.vision_tower
        self.vision_tower._image_processor = processor.image_processor
        self.connector = source.model.multi_modal_projector
        self.tokenizer = processor.tokenizer

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    def get_decoder(self) -> Any:
        return self.language_model.get_decoder()

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, labels: Any = None, images: Any = None, **options: Any
    ) -> Any:
        _, _, attention_mask, _, embeddings, labels = self.prepare_inputs_labels_for_multimodal(
            input_ids, None, attention_mask, None, labels, images, None
        )
        return self.language_model.forward(
            inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels, **options
        )

    def prepare_inputs_labels_for_multimodal(
        self, input_ids: Any, position_ids: Any, attention_mask: Any, past: Any, labels: Any, images: Any, sizes: Any
    ) -> Any:
        features = self.connector(self.vision_tower(images, output_hidden_states=True).hidden_states[-2][:, 1:])
        given = torch.full_like(input_ids, IGNORED) if labels is None else labels
        rows, marks = [], []
        for ids, row_labels, real, image in zip(input_ids, given, attention_mask, features, strict=True):
            ids, row_labels = ids[real.bool()], row_labels[real.bool()]
            at = int((ids == PLACEHOLDER).nonzero())
            embed = self.get_input_embeddings()
            rows.append(torch.cat([embed(ids[:at]), image, embed(ids[at + 1 :])]))
            marks.append(
                torch.cat([row_labels[:at], row_labels.new_full((len(image),), IGNORED), row_labels[at + 1 :]])
            )
        side, limit = self.config.tokenizer_padding_side, self.config.tokenizer_model_max_length
        rows, marks = ([row[:limit] for row in many] for many in (rows, marks))
        real = pad_sequence([torch.ones(len(row)) for row in rows], True, 0, side).to(attention_mask.dtype)
        new_labels = None if labels is None else pad_sequence(marks, True, IGNORED, side)
        return None, position_ids, real, past, pad_sequence(rows, True, 0.0, side), new_labels


class TextPreprocess:
    _FORMS = {"pretrain": "<image>{}\n", "llama": "Two talk. USER: <image> ASSISTANT: {}</s>"}

    def __init__(self, tokenizer: Any, version: str) -> None:
        assert version in self._FORMS, f"{version} is not there"
        self._tokenizer, self._form, self.template = tokenizer, self._FORMS[version], self

    @staticmethod
    def tokenizer_image_token(prompt: str, tokenizer: Any, return_tensors: str) -> torch.Tensor:
        before, after = (tokenizer(part)["input_ids"] for part in prompt.split("<image>"))
        return torch.tensor([*before, PLACEHOLDER, *after])

    def __call__(self, messages: list[dict[str, str]], mode: str = "train") -> dict[str, Any]:
        assert "<image>" in messages[0]["value"]
        prompt = self._form.format(messages[1]["value"])
        ids = self.tokenizer_image_token(prompt, self._tokenizer, return_tensors="pt")
        return {"input_ids": ids, **({"labels": ids.clone()} if mode == "train" else {"prompt": prompt})}


class ImagePreprocess:
    def __init__(self, image_processor: Any, data_args: Any) -> None:
        self._processor, self._ratio = image_processor, data_args.image_aspect_ratio

    def __call__(self, image: Image.Image) -> torch.Tensor:
        if self._ratio == "pad":
            background = tuple(int(x * 255) for x in self._processor.image_mean)
            image = ImageOps.pad(image, (max(image.size),) * 2, color=background)
        return self._processor(image, return_tensors="pt")["pixel_values"][0]


class Dataset(torch.utils.data.Dataset):
    """What the training script trains on; it carries the script's arguments."""

    def __init__(self, model: Any, pairs: list[tuple[Any, str]], version: str) -> None:
        self.data_args = SimpleNamespace(conv_version=version, image_aspect_ratio=model.config.image_aspect_ratio)
        self._texts = TextPreprocess(model.tokenizer, version)
        self._images = ImagePreprocess(model.vision_tower._image_processor, self.data_args)
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, text = self._pairs[index]
        turns = [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": text}]
        return {**self._texts(turns), "image": self._images(image)}


def collator(pad_id: int) -> Any:
    def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
        ids = pad_sequence([item["input_ids"] for item in items], True, pad_id)
        labels = pad_sequence([item["labels"] for item in items], True, IGNORED)
        images = torch.stack([item["image"] for item in items])
        return {"input_ids": ids, "labels": labels, "attention_mask": ids != pad_id, "images": images}

    return collate


def install(monkeypatch: Any) -> None:
    """Let `import tinyllava...` find the above for one test."""
    contents: dict[str, dict[str, Any]] = {
        "tinyllava": {},
        "tinyllava.utils": {},
        "tinyllava.utils.constants": {"IMAGE_TOKEN_INDEX": PLACEHOLDER, "DEFAULT_IMAGE_TOKEN": "<image>"},
        "tinyllava.data": {},
        "tinyllava.data.text_preprocess": {"TextPreprocess": TextPreprocess},
        "tinyllava.data.image_preprocess": {"ImagePreprocess": ImagePreprocess},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(TinyLlavaForConditionalGeneration, "__module__", "tinyllava.model.modeling_tinyllava")
