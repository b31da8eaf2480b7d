# SPDX-License-Identifier: Apache-2.0
"""Model configurations whose value is compared; imported on both sides of the two environments."""

from typing import Any

# Folders of the assets; everything else in a case is a value of the model's configuration.
LANGUAGE_MODEL, VISION_TOWER = "language_model", "vision_tower"

CASES: dict[str, dict[str, Any]] = {
    "square": {},
    "pad": {"image_aspect_ratio": "pad"},
    "anyres": {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "flat"},
    "anyres, spatial_unpad": {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"},
    "linear projector": {"mm_projector_type": "linear"},
    "mlp3x projector": {"mm_projector_type": "mlp3x_gelu"},
    "identity projector": {"mm_projector_type": "identity", VISION_TOWER: "tiny-clip-vit-wide"},
    "mistral": {LANGUAGE_MODEL: "tiny-mistral"},
    "mistral, anyres": {LANGUAGE_MODEL: "tiny-mistral", "image_aspect_ratio": "anyres"},
    "left padding": {"tokenizer_padding_side": "left"},
    "truncated": {"tokenizer_model_max_length": 24},
    "im_start_end": {"mm_use_im_start_end": True},
}


def templates_of(case: str) -> tuple[str, ...]:
    """Conversation templates a case is tried with; v1's system prompt alone is longer than the truncated length."""
    return ("plain",) if case == "truncated" else ("plain", "v1")


VALUE_CASES = [f"{case}, {template}" for case in CASES for template in templates_of(case)]

# Ways to prepare images, tried with image files of every colour mode.
IMAGE_MODES = ("square", "pad", "anyres, spatial_unpad")
