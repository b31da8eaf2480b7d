# SPDX-License-Identifier: Apache-2.0
"""One rank that measures families with sharded weights on unlike samples: `families_worker FOLDER SETUP [NAME ...]`."""

from __future__ import annotations

import sys
from typing import Any

from tests.families.torchvision_ops import load_torchvision

load_torchvision()

import deepspeed  # noqa: E402
import torch.distributed as dist  # noqa: E402
from PIL import Image  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402

from mir_callback import Probe, evaluate_mir  # noqa: E402
from tests.distributed.launch import write_rank  # noqa: E402
from tests.distributed.train_worker import deepspeed_config  # noqa: E402
from tests.families.registry import families  # noqa: E402
from tests.samples import pairs  # noqa: E402


def unlike(count: int = 5) -> Probe:
    """Pairs, the second with a large image."""
    found = [(image.resize((40, 40)), text) for image, text in pairs(count)]
    found[1] = found[1][0].resize((96, 128), Image.Resampling.BICUBIC), found[1][1]
    return Probe.from_pairs(found)


def sharded(model: Any, setup: str) -> Any:
    """The model under ZeRO-3, or under FSDP2 with the layers wrapped that Accelerate would wrap."""
    if setup == "zero3":
        config = {**(deepspeed_config("3") or {}), "zero_allow_untested_optimizer": True}
        return deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())[0]
    names = {name for each in model.modules() for name in getattr(each, "_no_split_modules", None) or ()}
    for part in reversed([each for each in model.modules() if type(each).__name__ in names]):
        fully_shard(part)
    return fully_shard(model)


def main(folder: str, setup: str, *names: str) -> None:
    """Write the value of each family that is measured, or of those named."""
    dist.init_process_group("gloo")
    found = {}
    for family in families():
        if not family.refused and (not names or family.name in names):
            print(family.name, flush=True)
            model, processor = family.build()
            found[family.name] = evaluate_mir(sharded(model, setup), unlike(), processor=processor, batch_size=2).mir
    write_rank(folder, dist.get_rank(), found)


if __name__ == "__main__":
    main(*sys.argv[1:])
    dist.destroy_process_group()  # left open, it may abort the process at its exit
