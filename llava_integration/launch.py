# SPDX-License-Identifier: Apache-2.0
"""Run an unmodified training script with MIR attached right before its Trainer starts.

    python -m llava_integration.launch --mir_images DIR --mir_texts DIR [--mir_...] -- train.py ITS OWN ARGUMENTS
    torchrun --nproc_per_node 8 -m llava_integration.launch --mir_images ... -- train.py ...
    deepspeed --module llava_integration.launch --mir_images ... -- train.py ...

`python -m mir_callback.launch` is the same.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser, Trainer

from llava_integration.attach import attach_mir
from mir_callback import MIRCallback
from mir_callback.errors import ConfigError
from mir_callback.training.arguments import MIRArguments

SEPARATOR = "--"


def main(arguments: list[str]) -> None:
    """Read our flags up to `--`, then run the script behind it as Python would.

    Raises:
        ConfigError: no script, or a flag breaks its rule; before the script starts.
    """
    flags: Any = MIRArguments
    parser = HfArgumentParser(flags, description=__doc__)
    if arguments[:1] in (["--help"], ["-h"]):
        parser.print_help()
        return
    ours, script = split(arguments)
    (options,) = parser.parse_args_into_dataclasses(ours)
    if not options.enabled:
        raise ConfigError(
            "mir_images and mir_texts, or mir_probe, must be given before --, got none; without them run the script"
        )
    attach_before_training(options)
    sys.argv = script
    sys.path.insert(0, str(Path(script[0]).resolve().parent))
    runpy.run_path(script[0], run_name="__main__")


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our flags and the script's command line.

    DeepSpeed's launcher puts `--local_rank=N` in front of everything; it belongs to the script.
    """
    if SEPARATOR not in arguments:
        raise ConfigError(f"the script must follow {SEPARATOR}, got {' '.join(arguments) or 'nothing'}; see --help")
    at = arguments.index(SEPARATOR)
    ours, script = arguments[:at], arguments[at + 1 :]
    if not script or not Path(script[0]).is_file():
        raise ConfigError(f"the script behind {SEPARATOR} must be a file, got {script[:1] or 'nothing'}")
    ranks = [word for word in ours if word.startswith("--local_rank=")]
    return [word for word in ours if word not in ranks], [*script, *ranks]


def attach_before_training(options: MIRArguments) -> None:
    """From now on every Trainer that starts training has MIR attached, unless it has already."""
    trainer_class: Any = Trainer
    original = trainer_class.train

    def train(trainer: Any, *args: Any, **keywords: Any) -> Any:
        if not any(isinstance(callback, MIRCallback) for callback in trainer.callback_handler.callbacks):
            attach_mir(trainer, **options.attach_options())
        return original(trainer, *args, **keywords)

    trainer_class.train = train


if __name__ == "__main__":
    main(sys.argv[1:])
