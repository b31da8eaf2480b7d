# SPDX-License-Identifier: Apache-2.0
"""Train the same recipes with many seeds, to see how far MIR differs where nothing but the seed does.

    python benchmarks/seeds.py --output runs/seeds --seeds 12

It is LLaVA's first stage of `examples/tiny_llava_pretrain.py`, shorter and on one process: backbones are trained once
and cached, then each run trains a freshly drawn projector on the recipe's data in a freshly drawn order. The recipes
called random_* train the whole of the tests' tiny model of random weights instead. A run that is there already is left
as it is. `benchmarks/comparing.py` then compares the runs as `mir compare` does.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoProcessor, LlavaForConditionalGeneration, PrinterCallback, Trainer, TrainingArguments
from transformers import set_seed as draw_from

from mir_callback import MIRCallback, Probe
from mir_callback.history import FILE_NAME

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_llava.collator import CaptionCollator
from tiny_llava.prepare import Start, prepare
from tiny_llava.runtime import quieten
from tiny_llava.scenes import Scenes
from tiny_llava.settings import Settings

from tests import tiny_models
from tests.samples import pairs
from tests.training.runs import Pairs, collator


@dataclass(frozen=True)
class Recipe:
    """What is the same in all runs of a name."""

    learning_rate: float = 1e-3
    batch: int = 16
    steps: int = 120
    words: int | None = None  # captions are cut to so many


RECIPES = {
    "base": Recipe(),
    "slow": Recipe(learning_rate=3e-4),
    "fast": Recipe(learning_rate=4e-3),
    "small_batch": Recipe(batch=4),
    "short_captions": Recipe(words=4),
}
PROBE_SAMPLES, EVALUATIONS = 40, 24
# A model of random weights, trained as a whole: as unsettled as training can be.
RANDOM_RECIPES = {
    "random_3e-3": {"learning_rate": 3e-3},
    "random_1e-3": {"learning_rate": 1e-3},
    "random_constant": {"learning_rate": 3e-3, "lr_scheduler_type": "constant"},
}


class ShortScenes(Scenes):
    """Scenes whose captions are cut."""

    words: int | None = None

    def __getitem__(self, index: int) -> dict[str, object]:
        """A scene, with the first words of its caption only."""
        item = super().__getitem__(index)
        return {**item, "caption": " ".join(str(item["caption"]).split()[: self.words])}


def train(recipe: Recipe, seed: int, start: Start, settings: Settings, folder: Path) -> None:
    """One run, from a projector drawn with the seed, over the data in an order drawn with it."""
    processor = AutoProcessor.from_pretrained(start.model)
    model = LlavaForConditionalGeneration.from_pretrained(start.model)
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector
    projector.requires_grad_(True)
    redraw(projector, seed)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.03 * recipe.steps),
        logging_steps=10,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        seed=seed,
    )
    data = ShortScenes(recipe.steps * recipe.batch, "train", seed=1, cell=settings.cell)
    data.words = recipe.words
    collator = CaptionCollator(processor)
    trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=collator, processing_class=processor)
    trainer.remove_callback(PrinterCallback)
    probe = Probe.from_folders(images=start.images, texts=start.texts, num_samples=PROBE_SAMPLES, seed=0)
    MIRCallback(probe, every=recipe.steps // EVALUATIONS, batch_size=PROBE_SAMPLES).attach(trainer)
    trainer.train()
    trainer.save_state()


def train_random(options: dict[str, Any], seed: int, folder: Path) -> None:
    """One run of the tests' tiny LLaVA: the same random backbones, a projector drawn with the seed, and its order."""
    model, processor = tiny_models.llava(dropout=0.1)
    redraw(model.model.multi_modal_projector, seed)
    settings = {"max_steps": 60, "per_device_train_batch_size": 4, "logging_steps": 5, "save_strategy": "no"}
    settings |= {"report_to": [], "use_cpu": True, "remove_unused_columns": False, "disable_tqdm": True}
    args = TrainingArguments(output_dir=str(folder), seed=seed, **settings, **options)
    parts = {"data_collator": collator(processor), "processing_class": processor}
    trainer = Trainer(model=model, args=args, train_dataset=Pairs(128), **parts)
    trainer.remove_callback(PrinterCallback)
    MIRCallback(Probe.from_pairs(pairs(24)), every=3, batch_size=24).attach(trainer)
    trainer.train()
    trainer.save_state()


def redraw(projector: nn.Module, seed: int) -> None:
    """Draw a projector's weights anew."""
    draw_from(seed)
    for module in projector.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def main() -> None:
    """Train what is missing, seed by seed."""
    names = [*RECIPES, *RANDOM_RECIPES]
    parser = argparse.ArgumentParser(description="Train the same recipes with many seeds.")
    parser.add_argument("--output", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--cache", type=Path, default=Path("runs/demo_cache"), help="folder of the trained backbones")
    parser.add_argument("--recipes", nargs="*", default=names, choices=names)
    parser.add_argument("--seeds", type=int, default=12)
    options = parser.parse_args()
    quieten()
    settings = Settings()
    start = prepare(options.cache, settings)
    for seed in range(1, options.seeds + 1):
        for name in options.recipes:
            folder = options.output / name / f"seed_{seed}"
            if (folder / "trainer_state.json").exists():  # written last
                continue
            if name in RECIPES:
                train(RECIPES[name], seed, start, settings, folder)
            else:
                train_random(RANDOM_RECIPES[name], seed, folder)
            print(f"{folder}: {(folder / FILE_NAME).read_text().count(chr(10))} evaluations", flush=True)


if __name__ == "__main__":
    main()
