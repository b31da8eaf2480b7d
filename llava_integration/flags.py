# SPDX-License-Identifier: Apache-2.0
"""The launcher's command line: its usage, its flags in groups, its errors as one line each."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from typing import Any, NoReturn

from transformers.hf_argparser import string_to_bool

from mir_callback.training.arguments import MIRArguments

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
