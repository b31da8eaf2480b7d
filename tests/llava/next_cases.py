# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT configurations whose value is compared with the real repository.

By name: language model, vision tower, conversation template, configuration.
"""

from typing import Any

_UNPAD = "spatial_unpad"


def _mode(aspect: str, merge: str = "flat", **more: Any) -> dict[str, Any]:
    return {"image_aspect_ratio": aspect, "mm_patch_merge_type": merge, **more}


CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    **{
        f"{aspect}, {merge}, {language}, {tower}": (language, tower, template, _mode(aspect, merge))
        for aspect in ("square", "pad", "anyres", "anyres_max_2", "anyres_max_9")
        for merge in ("flat", _UNPAD)
        for language, tower, template in (("qwen", "siglip", "plain"), ("llama", "clip", "plain"))
    },
    # The grid of "highres" is a text in process_images, and the result always 2 x 2 tiles and one.
    "highres, flat, llama, clip": ("llama", "clip", "plain", _mode("highres", image_grid_pinpoints="32,64")),
    "highres, spatial_unpad, llama, clip": (
        "llama",
        "clip",
        "plain",
        _mode("highres", _UNPAD, image_grid_pinpoints="32,64"),
    ),
    "crop_split, flat, llama, clip": ("llama", "clip", "plain", _mode("crop_split")),
    "anyres, spatial, qwen, clip": ("qwen", "clip", "plain", _mode("anyres", "spatial")),
    "anyres_max_9, qwen_1_5, qwen, clip": ("qwen", "clip", "qwen_1_5", _mode("anyres_max_9", _UNPAD)),
    "anyres, vicuna_v1, llama, clip": ("llama", "clip", "vicuna_v1", _mode("anyres", _UNPAD)),
    "im_start_end, vicuna_v1, llama, clip": ("llama", "clip", "vicuna_v1", _mode("pad", mm_use_im_start_end=True)),
    "left padding, qwen, clip": ("qwen", "clip", "plain", _mode("anyres", _UNPAD, tokenizer_padding_side="left")),
    "anyres, spatial_unpad, mixtral, clip": ("mixtral", "clip", "plain", _mode("anyres", _UNPAD)),
    "linear projector, qwen, clip": ("qwen", "clip", "plain", _mode("square", mm_projector_type="linear")),
}
