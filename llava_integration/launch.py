# SPDX-License-Identifier: Apache-2.0
"""Run an unmodified training script with MIR attached right before its Trainer starts.

`python -m mir_callback.launch --help` shows how; `python -m llava_integration.launch` is the same.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

from transformers import Trainer

from llava_integration.attach import attach_mir, draw_or_load
from llava_integration.compatibility import explain
from llava_integration.flags import make_parser, print_usage, read_flags
from mir_callback import MIRCallback
from mir_callback.errors import ConfigError, MIRError
from mir_callback.training.arguments import MIRArguments

SEPARATOR = "--"


def main(arguments: list[str]) -> None:
    """Read our flags up to `--`, then run the script behind it as Python would.

    Raises:
        SystemExit: 2 after one line on stderr if there is no script or a flag breaks its rule, before the script
            starts; 0 after `--help`.
    """
    options, script = read_command_line(arguments)
    attached = attach_before_training(options)
    sys.argv = script
    sys.path.insert(0, str(Path(script[0]).resolve().parent))
    try:
        runpy.run_path(script[0], run_name="__main__")
    except Exception as error:
        hint = explain(error)
        if hint:
            print(f"[mir] {hint}", file=sys.stderr)
        raise
    if not attached:
        print(
            f"[mir] WARNING: {script[0]} ended without training a Trainer of transformers; MIR was never measured",
            file=sys.stderr,
        )


def read_command_line(arguments: list[str]) -> tuple[MIRArguments, list[str]]:
    """Options and the script's command line; exits where :func:`main` says so."""
    if not arguments:
        print_usage()
    try:
        if {"--help", "-h"} & set(arguments[: arguments.index(SEPARATOR)] if SEPARATOR in arguments else arguments):
            make_parser().print_help()
            raise SystemExit(0)
        ours, script = split(arguments)
        options = read_flags(ours)
        if not options.enabled:
            raise ConfigError(
                "mir_images and mir_texts, or mir_probe, must be given before --, got none; without them run the script"
            )
        sources = options.attach_options()
        names = ("probe", "images", "texts", "num_samples", "seed")
        draw_or_load(*(sources[name] for name in names))  # now, and not when the script has loaded its model
    except MIRError as error:
        make_parser().error(str(error))
    return options, script


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our flags and the script's command line.

    DeepSpeed's launcher puts `--local_rank=N` in front of everything; it belongs to the script.
    """
    if SEPARATOR not in arguments:
        raise ConfigError(f"the script must follow {SEPARATOR}, got {' '.join(arguments) or 'nothing'}")
    at = arguments.index(SEPARATOR)
    ours, script = arguments[:at], arguments[at + 1 :]
    if not script or not Path(script[0]).is_file():
        raise ConfigError(f"the script behind {SEPARATOR} must be a file, got {script[:1] or 'nothing'}")
    ranks = [word for word in ours if word.startswith("--local_rank=")]
    return [word for word in ours if word not in ranks], [*script, *ranks]


def attach_before_training(options: MIRArguments) -> list[MIRCallback]:
    """From now on every Trainer that starts training has MIR attached, unless it has already.

    Returns:
        The callbacks found or attached so far; it grows as Trainers start.
    """
    attached: list[MIRCallback] = []
    trainer_class: Any = Trainer
    original = trainer_class.train

    def train(trainer: Any, *args: Any, **keywords: Any) -> Any:
        found = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, MIRCallback)]
        attached.extend(found or [attach_mir(trainer, **options.attach_options())])
        return original(trainer, *args, **keywords)

    trainer_class.train = train
    return attached


if __name__ == "__main__":
    main(sys.argv[1:])
