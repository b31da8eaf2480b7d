# SPDX-License-Identifier: Apache-2.0
"""The vision tower: a tiny CLIP vision transformer that learns to see handwritten digits.

It is trained at the layer LLaVA will read (the last but one) to tell, from each patch feature, which digit the patch
belongs to. The head that does so is thrown away afterwards.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.image_processing_utils import BaseImageProcessor

from .progress import Progress, warm_up_and_decay
from .scenes import DIGIT_WORDS, Scenes, Split
from .settings import Settings

FEATURE_LAYER = -2  # as in LLaVA-1.5


def train_vision_tower(settings: Settings, folder: Path) -> None:
    """Train a CLIP tower from scratch on labelled scenes, say how well it sees unseen scans; write to ``folder``."""
    torch.manual_seed(settings.seed)
    tower = CLIPVisionModel(vision_config(settings)).train()
    head = nn.Linear(settings.vision_hidden, len(DIGIT_WORDS))
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=settings.vision_rate, weight_decay=0.01)
    schedule = warm_up_and_decay(optimizer, settings.vision_steps)
    progress = Progress("vision tower", settings.vision_steps)
    pixels, labels = labelled_patches(settings, "train", settings.vision_scenes)
    for _ in range(settings.vision_steps):
        batch = torch.randint(len(pixels), (settings.vision_batch,))
        logits = head(patch_features(tower, pixels[batch]))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[batch].flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        progress.advance(patch_loss=loss.item())
    progress.tell(f"sees the right digit in {_accuracy(settings, tower, head):.1%} of the patches of unseen scans")
    add_massive_dimensions(tower, settings)
    tower.save_pretrained(folder)
    make_image_processor(settings).save_pretrained(folder)


def make_image_processor(settings: Settings) -> BaseImageProcessor:
    """Build CLIP's image processor for scenes of the demo's size."""
    # From transformers 5 on, the plain name is a processor that needs torchvision.
    clip_processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    side = {"height": settings.side, "width": settings.side}
    processor: BaseImageProcessor = clip_processor(size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return processor


def vision_config(settings: Settings) -> CLIPVisionConfig:
    """Describe a CLIP vision tower of the demo's size."""
    return CLIPVisionConfig(
        hidden_size=settings.vision_hidden,
        intermediate_size=settings.vision_intermediate,
        num_hidden_layers=settings.vision_layers,
        num_attention_heads=settings.vision_heads,
        image_size=settings.side,
        patch_size=settings.patch,
        projection_dim=settings.vision_hidden,
    )


def patch_features(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """Features of all patches at the layer LLaVA reads, without the class token."""
    features: Tensor = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[FEATURE_LAYER]
    return features[:, 1:]


def labelled_patches(settings: Settings, split: Split, size: int) -> tuple[Tensor, Tensor]:
    """Scenes as pixel values (n, 3, side, side) and the digit under each of their patches (n, patches)."""
    scenes = Scenes(size, split, seed=settings.seed + 100, cell=settings.cell)
    drawn = [scenes.scene(index) for index in range(size)]
    pixels = make_image_processor(settings)([scene.image for scene in drawn], return_tensors="pt")["pixel_values"]
    half = settings.grid // 2
    quadrants = torch.tensor([scene.digits for scene in drawn]).view(-1, 2, 2)
    return pixels, quadrants.repeat_interleave(half, 1).repeat_interleave(half, 2).flatten(1)


def add_massive_dimensions(tower: CLIPVisionModel, settings: Settings) -> None:
    """Shift a few features far off centre, by the last bias before the layer LLaVA reads.

    Large vision transformers, CLIP's among them, grow a few fixed feature dimensions with values that dwarf all others
    (arXiv:2402.17762); a tower as small and as briefly trained as this one doesn't. Here they are the same for every
    token, so that no information is lost, but vision tokens become long and alike, and MIR stays high until the
    projector has learnt to drop them.
    """
    layers = next(module for name, module in tower.named_modules() if name.endswith("encoder.layers"))
    with torch.no_grad():
        layers[FEATURE_LAYER].mlp.fc2.bias[list(settings.massive_dimensions)] += settings.massive_value


@torch.no_grad()
def _accuracy(settings: Settings, tower: CLIPVisionModel, head: nn.Linear) -> float:
    pixels, labels = labelled_patches(settings, "held_out", 500)
    seen = head(patch_features(tower.eval(), pixels)).argmax(-1)
    return float((seen == labels).float().mean())
