# SPDX-License-Identifier: Apache-2.0
"""Model configurations whose value is compared; imported on both sides of the two environments."""

from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "square": {},
    "pad": {"image_aspect_ratio": "pad"},
    "anyres": {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "flat"},
    "anyres, spatial_unpad": {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"},
    "linear projector": {"mm_projector_type": "linear"},
    "left padding": {"tokenizer_padding_side": "left"},
    "truncated": {"tokenizer_model_max_length": 24},
    "im_start_end": {"mm_use_im_start_end": True},
}


def templates_of(case: str) -> tuple[str, ...]:
    """Conversation templates a case is tried with; v1's system prompt alone is longer than the truncated length."""
    return ("plain",) if case == "truncated" else ("plain", "v1")


VALUE_CASES = [f"{case}, {template}" for case in CASES for template in templates_of(case)]
