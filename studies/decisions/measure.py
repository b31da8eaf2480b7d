# SPDX-License-Identifier: Apache-2.0
"""MIR and its companions at every point of a run, and what the stop rule makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from mir_callback import MIRConfig, PlateauRule, Probe
from mir_callback.evaluation.evaluate import Evaluator
from mir_callback.evaluation.report import MIRReport
from mir_callback.probe.adapters import find_adapter

from . import candidates, stages
from .recipes import STOP_SEEDS, Recipe
from .world import SETTINGS, Scenes, World, batch_of

TEXT_TOKENS = 32  # twice the image tokens of a scene; the paper's stories have about that proportion
MATCHED_EVERY = 4  # points between evaluations on captions, and between any where no stop rule is tried
FIELDS = ("mir", "mir_se", "scale_free_mir", "vision_gain", "vision_gain_se", "probe_loss")


class Measure:
    """The probes of the study: scenes with prose, as in the paper, and other unseen scenes with their captions."""

    def __init__(self, world: World) -> None:
        self.world = world
        start = world.start
        self.prose = Probe.from_folders(start.images, start.texts, num_samples=100, seed=0, max_text_tokens=TEXT_TOKENS)
        scenes = Scenes(100, "held_out", seed=11, cell=SETTINGS.cell)
        drawn = [scenes.scene(index) for index in range(len(scenes))]
        self.captions = Probe.from_pairs([(each.image, each.caption) for each in drawn], matched=True)

    def __call__(self, recipe: Recipe, seed: int, weights: Path) -> dict[str, Any]:
        """Curves over the points of a run, candidates at its end, and where `PlateauRule()` stops."""
        model, processor = self.world.model(recipe, seed), self.world.image_processor_for(recipe)
        adapter = find_adapter(model, processor, adapter=None, prompt=None)
        on_prose = Evaluator(model, self.prose, adapter, MIRConfig(batch_size=50))
        on_captions = Evaluator(model, self.captions, adapter, MIRConfig(batch_size=50, vision_gain=True))
        points, judged = stages.points(recipe), recipe.scored and seed in STOP_SEEDS
        records, curve = [], []
        for number, step in enumerate(points):
            if not judged and number % MATCHED_EVERY and step != points[-1]:
                continue
            stages.restore(model, weights / f"{step:05d}.pt")
            report = on_prose.evaluate(model, progress=False)
            records.append({"step": step, "max_steps": recipe.steps, **report.to_fields()})
            curve.append({"step": step, **_summary(report)})
            if number % MATCHED_EVERY == 0 or step == points[-1]:
                curve[-1]["captions"] = _summary(on_captions.evaluate(model, progress=False))
        verdicts = zip(records, PlateauRule().replay(records), strict=True)
        stops = [record["step"] for record, verdict in verdicts if verdict.stop] if judged else []
        return {
            "curve": curve,
            "stopped_at": stops[0] if stops else None,
            "candidates": self._candidates(model, recipe),
        }

    def _candidates(self, model: Any, recipe: Recipe) -> dict[str, float]:
        image = self.world.tokenizer.convert_tokens_to_ids("<image>")
        prose, captions = (
            candidates.collect(model, [self._batch(probe, recipe)], image) for probe in (self.prose, self.captions)
        )
        return {**candidates.measure(prose), **candidates.measure_matched(captions)}

    def _batch(self, probe: Probe, recipe: Recipe) -> dict[str, Tensor]:
        """A probe's samples as one batch, made without the package's own encoding."""
        images = [sample.open_image() for sample in probe.samples]
        pixels = self.world.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        texts = [sample.text for sample in probe.samples]
        prompts, limit = [""] * len(texts), probe.max_text_tokens
        batch = batch_of(self.world.tokenizer, stages.images_of(recipe), pixels, prompts, texts, limit)
        del batch["labels"]
        return batch


def _summary(report: MIRReport) -> dict[str, Any]:
    """Of a report what the study keeps: single numbers, and companions as means over the layers."""
    means = {name: sum(values) / len(values) for name, values in report.companions.items()}
    found = {name: getattr(report, name) for name in FIELDS} | means | {"last_layer": report.per_layer[-1]}
    return {name: float(f"{value:.6g}") for name, value in found.items() if value is not None}
