# SPDX-License-Identifier: Apache-2.0
"""What pre-training starts from, made once and cached: the joined model, its processor, the folders of the probe."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from .language import train_language_model
from .prose import split_prose, write_texts
from .runtime import quieten
from .scenes import Scenes, write_images
from .settings import Settings
from .tokenizer import IMAGE
from .vision import FEATURE_LAYER, make_image_processor, train_vision_tower

_MODULES = ("language", "prepare", "prose", "scenes", "tokenizer", "vision")


@dataclass(frozen=True)
class Start:
    """The cached folder of one set of settings."""

    folder: Path

    @property
    def model(self) -> Path:
        """The LLaVA model with trained backbones and a fresh projector, and its processor."""
        return self.folder / "model"

    @property
    def images(self) -> Path:
        """Scenes of scans that were never trained with, as PNG files."""
        return self.folder / "probe" / "images"

    @property
    def texts(self) -> Path:
        """Pieces of prose that were never trained with, as text files."""
        return self.folder / "probe" / "texts"


def prepare(cache: Path, settings: Settings) -> Start:
    """Return what pre-training starts from; make it if it isn't in the cache yet.

    Any number of processes may call this at the same time: one does the work while the others wait for its lock.
    """
    prose, held_out = split_prose(settings.probe_samples, settings.seed)
    start = Start(cache / f"start-{_key(settings, prose + held_out)}")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{start.folder.name}.lock"):
        if not start.folder.is_dir():
            unfinished = Start(cache / f"{start.folder.name}.unfinished")
            shutil.rmtree(unfinished.folder, ignore_errors=True)
            _make(unfinished, settings, prose, held_out)
            unfinished.folder.rename(start.folder)
    return start


def _key(settings: Settings, texts: list[str]) -> str:
    """Identify what the result depends on: the settings, the prose this version of Python ships, and the code."""
    code = [Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8") for module in _MODULES]
    contents = json.dumps([asdict(settings), texts, code], sort_keys=True)
    return hashlib.sha256(contents.encode()).hexdigest()[:12]


def _make(start: Start, settings: Settings, prose: list[str], held_out: list[str]) -> None:
    """Train both backbones side by side, one core each, and write everything to the folder of ``start``."""
    print("Training the backbones (once; later runs find them in the cache):", flush=True)
    tower, language_model = start.folder / "vision_tower", start.folder / "language_model"
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn, initializer=_set_up_worker) as pool:
        jobs = [
            pool.submit(train_vision_tower, settings, tower),
            pool.submit(train_language_model, settings, prose, language_model),
        ]
        for job in as_completed(jobs):
            job.result()
    processor = make_processor(language_model, settings)
    join(tower, language_model, processor, settings).save_pretrained(start.model)
    processor.save_pretrained(start.model)
    write_images(Scenes(settings.probe_samples, "held_out", seed=settings.seed, cell=settings.cell), start.images)
    write_texts(held_out, start.texts)


def _set_up_worker() -> None:
    """Keep a worker to one core and to its own progress lines."""
    torch.set_num_threads(1)
    quieten()


def make_processor(language_model: Path, settings: Settings) -> LlavaProcessor:
    """Build LLaVA's processor: it turns images into pixel values and ``<image>`` into one token per patch."""
    return LlavaProcessor(
        image_processor=make_image_processor(settings),
        tokenizer=AutoTokenizer.from_pretrained(language_model),
        patch_size=settings.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def join(
    tower: Path, language_model: Path, processor: LlavaProcessor, settings: Settings
) -> LlavaForConditionalGeneration:
    """Put the trained backbones and a fresh two-layer projector together as LLaVA-1.5 does."""
    vision = CLIPVisionModel.from_pretrained(tower)
    language = LlamaForCausalLM.from_pretrained(language_model)
    config = LlavaConfig(
        vision_config=vision.config.to_dict(),
        text_config=language.config.to_dict(),
        image_token_index=processor.tokenizer.convert_tokens_to_ids(IMAGE),
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=FEATURE_LAYER,
        image_seq_length=settings.grid**2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(settings.seed)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    for module in model.model.multi_modal_projector.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()  # torch's own start, which the original LLaVA trains from
    return model
