# SPDX-License-Identifier: Apache-2.0
"""Short stage-1 runs of the demo's model on one process, to compare recipes with each other in minutes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from mir_callback import EvalRecord, MIRCallback, Probe
from mir_callback.cli import main as mir
from mir_callback.history import FILE_NAME, read_history

from .collator import CaptionCollator
from .prepare import Start
from .scenes import Scene, Scenes, Split
from .settings import Settings

Caption = Callable[[Sequence[int]], str]
# Above what `columns_of` returns.
COLUMNS = f"{'start':>5}  {'peak':>16}  {'end':>15}"


@dataclass(frozen=True)
class Size:
    """How much is trained and measured.

    Attributes:
        steps: optimizer steps of a run.
        batch: scenes in each of them.
        every: steps between evaluations.
        probe_samples: samples of the probe.
        backbones: what the backbones are; those of the demo are found in its cache.
    """

    steps: int = 240
    batch: int = 16
    every: int = 30
    probe_samples: int = 60
    backbones: Settings = Settings()


# To see that everything works. Backbones that have learnt nothing: the values mean nothing either.
REHEARSAL = Size(
    steps=4,
    batch=4,
    every=2,
    probe_samples=8,
    backbones=Settings(
        probe_samples=8, hidden=32, layers=2, intermediate=64, language_steps=2, vision_steps=2, vision_scenes=64
    ),
)


class CaptionedScenes(Dataset[dict[str, object]]):
    """The demo's scenes with captions of one's own.

    Args:
        scenes: the pictures.
        caption: makes a caption of the four digits in a picture; None for the demo's own.
    """

    def __init__(self, scenes: Scenes, caption: Caption | None = None) -> None:
        self._scenes = scenes
        self._caption = caption

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> dict[str, object]:
        scene: Scene = self._scenes.scene(index)
        return {"image": scene.image, "caption": self._caption(scene.digits) if self._caption else scene.caption}


class Heading(TrainerCallback):
    """Says which run the lines that follow are of.

    Args:
        name: of the recipe, None where the learning rate says it all.
    """

    def __init__(self, name: str | None = None) -> None:
        self._name = name

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print it; a search has set the arguments of its trial by now."""
        of = [self._name] if self._name else []
        told = [*of, f"learning rate {args.learning_rate:g}", f"seed {args.seed}", f"{state.max_steps} steps"]
        print(f"\n--- {', '.join(told)}", flush=True)


class Course(NamedTuple):
    """Where MIR of a run started, where it was highest, and where it ended."""

    start: EvalRecord
    peak: EvalRecord
    end: EvalRecord


def make_trainer(
    start: Start,
    size: Size,
    output: Path,
    *,
    learning_rate: float = 3e-3,
    caption: Caption | None = None,
    name: str | None = None,
    seed: int = 0,
    report_to: Sequence[str] = (),
    captions: bool = False,
) -> Trainer:
    """A stock Trainer with a MIRCallback, which makes its model anew for each run.

    Args:
        start: what `prepare` has made.
        size: of the run.
        output: its folder.
        learning_rate: the highest one.
        caption: of the training scenes, see `CaptionedScenes`.
        name: of the recipe, for the run's heading.
        seed: draws the projector and the order of the data.
        report_to: trackers.
        captions: the texts of the probe are captions of its scenes, and vision gain is measured too.
    """
    processor = AutoProcessor.from_pretrained(start.model)
    split: Split = "train"
    scenes = Scenes(size.steps * size.batch, split, seed=1, cell=size.backbones.cell)
    trainer = Trainer(
        model_init=lambda: fresh_model(start, seed),
        args=training_arguments(size, output, learning_rate, seed, report_to),
        train_dataset=CaptionedScenes(scenes, caption),
        data_collator=CaptionCollator(processor),
        processing_class=processor,
        callbacks=[Heading(name)],
    )
    trainer.remove_callback(PrinterCallback)
    if captions:
        unseen = Scenes(size.probe_samples, "held_out", seed=1, cell=size.backbones.cell)
        drawn = [unseen.scene(index) for index in range(len(unseen))]
        probe = Probe.from_pairs([(scene.image, scene.caption) for scene in drawn], matched=True)
    else:
        probe = Probe.from_folders(images=start.images, texts=start.texts, num_samples=size.probe_samples, seed=0)
    MIRCallback(probe, every=size.every, batch_size=size.probe_samples, vision_gain=captions).attach(trainer)
    return trainer


def fresh_model(start: Start, seed: int) -> LlavaForConditionalGeneration:
    """The backbones, frozen, and a projector drawn with the seed."""
    model = LlavaForConditionalGeneration.from_pretrained(start.model)
    model.requires_grad_(False)
    set_seed(seed)
    for module in model.model.multi_modal_projector.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def training_arguments(
    size: Size, output: Path, learning_rate: float, seed: int, report_to: Sequence[str]
) -> TrainingArguments:
    """LLaVA's first stage, shortened."""
    return TrainingArguments(
        output_dir=str(output),
        max_steps=size.steps,
        per_device_train_batch_size=size.batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(0.03 * size.steps),
        weight_decay=0.0,
        logging_steps=min(10, size.every // 2),  # before an evaluation, which notes the last loss
        save_strategy="no",
        report_to=list(report_to),
        remove_unused_columns=False,  # the collator reads them
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
    )


def course_of(run: Path) -> Course:
    """Read it from the run's history."""
    records = [record for record in read_history(run / FILE_NAME) if record.mir is not None]
    return Course(records[0], max(records, key=lambda record: record.mir), records[-1])


def columns_of(course: Course) -> str:
    """Start, peak and end with its standard error, under `COLUMNS`."""
    start, peak, end = course
    top = f"{peak.mir:.3f} (step {peak.step})"
    return f"{start.mir:>5.3f}  {top:>16}  {end.mir:>6.3f} +- {end.mir_se:.3f}"


def compare(*runs: str) -> None:
    """Show what `mir compare` says of runs, as on the command line."""
    print("\n$ mir compare " + " ".join(runs), flush=True)
    status = mir(["compare", *runs])
    if status:
        sys.exit(status)
