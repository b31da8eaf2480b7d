# SPDX-License-Identifier: Apache-2.0
"""Import torchvision where its compiled part, for CUDA, can't load beside a PyTorch for CPU.

Image processors use only its Python part, which asks for two operators when it is imported.
"""

import importlib.util
import sys

import torch


def load_torchvision() -> bool:
    """Whether torchvision is installed, and can now be imported."""
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
        import torchvision  # noqa: F401
    return True


_kept: list[torch.library.Library] = []
