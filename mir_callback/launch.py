# SPDX-License-Identifier: Apache-2.0
"""Run an unmodified training script with MIR attached right before its Trainer starts.

`python -m mir_callback.launch --help` shows how; `python -m mir_callback.launch` is the same.
"""

from __future__ import annotations

import argparse
import dataclasses
import runpy
import sys
import typing
from pathlib import Path
from typing import Any, NoReturn

from transformers import Trainer
from transformers.hf_argparser import string_to_bool

from llava_integration.attach import attach_mir, draw_or_load
from llava_integration.compatibility import explain
from mir_callback import MIRCallback
from mir_callback.config import MIRArguments
from mir_callback.errors import ConfigError, MIRError

PROGRAM = "python -m mir_callback.launch"
USAGE = f"""{PROGRAM} FLAGS -- SCRIPT ITS ARGUMENTS
       torchrun --nproc_per_node 8 -m mir_callback.launch FLAGS -- SCRIPT ITS ARGUMENTS
       deepspeed --module mir_callback.launch FLAGS -- SCRIPT ITS ARGUMENTS"""
DESCRIPTION = """Run an unmodified training script with MIR attached right before its Trainer starts.

The launcher's flags stand before the --, the script and all its own arguments behind it. The script runs as if Python
had been given it; its model may be an original LLaVA or a Hugging Face vision-language model."""
EXAMPLE = f"""example:
  {PROGRAM} --mir_images textvqa/val --mir_texts cnn/stories --mir_every 50 -- \\
      llava/train/train_mem.py --model_name_or_path lmsys/vicuna-7b-v1.5 --version plain ..."""
GROUPS = {
    "the probe": ("mir_images", "mir_texts", "mir_probe", "mir_num_samples", "mir_seed"),
    "failures": ("mir_on_error", "mir_max_failures", "mir_watchdog_seconds", "mir_abort_on_hang"),
    "stopping": (
        *("mir_stop", "mir_stop_window", "mir_stop_min_delta", "mir_stop_warmup", "mir_stop_horizon"),
        *("mir_stop_patience", "mir_stop_patience_steps", "mir_stop_log_steps", "mir_continue_after_stop"),
    ),
}
OTHERS = "the evaluations"


class FlagParser(argparse.ArgumentParser):
    """Its errors are one line; the usage stays with `--help`."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with status 2."""
        self.exit(2, f"error: {message}; see {PROGRAM} --help\n")


class _Layout(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Text as written, and every flag's default behind its help."""


def make_parser() -> FlagParser:
    """A parser of every field of :class:`MIRArguments`; `parse_args` gives them by name."""
    parser = FlagParser(
        prog=PROGRAM, usage=USAGE, description=DESCRIPTION, epilog=EXAMPLE, formatter_class=_Layout, allow_abbrev=False
    )
    group_of = {name: title for title, names in GROUPS.items() for name in names}
    groups = {title: parser.add_argument_group(title) for title in ("the probe", OTHERS, "failures", "stopping")}
    types = typing.get_type_hints(MIRArguments)
    for field in dataclasses.fields(MIRArguments):
        kind = (typing.get_args(types[field.name]) or (types[field.name],))[0]  # of `str | None`: str
        optional = field.default is None
        more: dict[str, Any] = {"type": kind}
        if kind is bool:  # as HfArgumentParser takes them: `--flag`, `--flag True`, `--flag False`
            more = {"type": string_to_bool, "nargs": "?", "const": True}
        groups[group_of.get(field.name, OTHERS)].add_argument(
            f"--{field.name}",
            **more,
            default=argparse.SUPPRESS if optional else field.default,  # a default of None would be shown as one
            help=field.metadata["help"],
            metavar="PATH" if optional and kind is str else kind.__name__.upper(),
        )
    return parser


def read_flags(words: list[str]) -> MIRArguments:
    """The options of a command line's own part.

    Raises:
        ConfigError: a flag breaks its rule.
        SystemExit: help was asked for (0), or the words are no flags of ours (2).
    """
    values: dict[str, Any] = vars(make_parser().parse_args(words))
    return MIRArguments(**values)


def print_usage() -> None:
    """Show how the launcher is called, on stderr."""
    make_parser().print_usage(sys.stderr)


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
