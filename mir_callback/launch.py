# SPDX-License-Identifier: Apache-2.0
"""Run an unmodified training script or console command with MIR attached to its Trainer.

`python -m mir_callback.launch --help` shows how.
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from mir_callback.config import FLAG_GROUPS, MIRArguments
from mir_callback.console import log
from mir_callback.errors import ConfigError, MIRError
from mir_callback.probe.probe import Probe

PROGRAM = "python -m mir_callback.launch"
SEPARATOR = "--"
USAGE = f"""{PROGRAM} FLAGS -- WHAT ITS ARGUMENTS
       torchrun --nproc_per_node 8 -m mir_callback.launch FLAGS -- WHAT ITS ARGUMENTS
       deepspeed --module mir_callback.launch FLAGS -- WHAT ITS ARGUMENTS"""
DESCRIPTION = """Run unmodified training code with MIR attached to its Trainer.

Before the -- are the flags below, after it is what to run with its own arguments: a Python script, -m and a module,
or a console command written in Python. It runs in this process, as Python would run it."""
EXAMPLE = f"""examples:
  {PROGRAM} --mir_images textvqa/val --mir_texts cnn/stories --mir_every 50 -- \\
      llava/train/train_mem.py --model_name_or_path lmsys/vicuna-7b-v1.5 --version plain ...
  {PROGRAM} --mir_probe probe.zip -- llamafactory-cli train pretrain.yaml"""


class FlagParser(HfArgumentParser):
    """Reports errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the line and exit with status 2."""
        self.exit(2, f"error: {message.rstrip('.')}. See {PROGRAM} --help\n")


class _Layout(argparse.RawDescriptionHelpFormatter):
    """Keeps line breaks, and shows each flag in one spelling with its default."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return f"{action.option_strings[0]}{' VALUE' if action.nargs is None else ''}"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.option_strings[0].startswith("--no_"):  # HfArgumentParser repeats the help of the flag it negates
            return f"the same as --{action.dest} False"
        shown = action.default not in (None, argparse.SUPPRESS)
        return f"{action.help} (default: %(default)s)" if shown else action.help


def find_target(words: list[str]) -> list[str]:
    """The command line after the separator; a console command is replaced by its file. ConfigError if not Python."""
    if not words or words == ["-m"]:
        raise ConfigError(f"Nothing to run after {SEPARATOR}: name a {'module' if words else 'script'}.")
    if words[0] == "-m":
        return words
    file = words[0] if os.path.isfile(words[0]) else shutil.which(words[0])
    if file is None:
        raise ConfigError(f"{words[0]} (after {SEPARATOR}) is neither a file nor a command on the PATH.")
    # The first line of an installed command names its Python, or the second if the path is long.
    with open(file, "rb") as opened:
        first, second = opened.readline(1000), opened.readline(1000)
    named = second if second.startswith(b"'''exec'") else first
    if not file.endswith(".py") and not (first.startswith(b"#!") and b"python" in named):
        raise ConfigError(
            f"{file} is not a Python script. If it starts one, put `{PROGRAM} ... {SEPARATOR}` in front of that one "
            "inside of it."
        )
    return [file, *words[1:]]


def run(target: list[str]) -> None:
    """Run a script, or a module after -m, in this process as Python would."""
    if target[0] == "-m":
        sys.argv = target[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(target[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = target
        sys.path.insert(0, str(Path(target[0]).resolve().parent))
        runpy.run_path(target[0], run_name="__main__")


def main(words: list[str]) -> None:
    """Parse the flags before `--`, then run what follows it.

    Exits with status 2 and one line on stderr if a flag is invalid or there is nothing to run; else as what was run.
    """
    arguments, probe, target = read_command_line(words)
    attached = attach_before_training(probe, arguments.options())
    try:
        run(target)
    except SystemExit as ended:
        if ended.code in (None, 0):
            _check_trained(attached, target)
        raise
    except Exception as error:
        _explain(error)
        raise
    _check_trained(attached, target)


def read_command_line(words: list[str]) -> tuple[Any, Probe, list[str]]:
    """The launcher's flags, the probe, and the command to run; exits on errors and after `--help`."""
    texts = {"prog": PROGRAM, "usage": USAGE, "description": DESCRIPTION, "epilog": EXAMPLE}
    parser = FlagParser(FLAG_GROUPS, **texts, formatter_class=_Layout, allow_abbrev=False)
    if not words:
        parser.print_usage(sys.stderr)
    at = words.index(SEPARATOR) if SEPARATOR in words else len(words)
    # DeepSpeed's launcher puts --local_rank first; it is meant for the script.
    ranks = [word for word in words[:at] if word.startswith("--local_rank=")]
    values, unknown = parser.parse_known_args([word for word in words[:at] if word not in ranks])
    if unknown:
        parser.error(f"Unknown flag {' '.join(unknown)}. Put the command to run after {SEPARATOR}")
    try:
        target = find_target(words[at + 1 :])
        arguments = MIRArguments(**vars(values))
        # Read now, so that errors show before the script loads its model.
        return arguments, arguments.probe_source().load(), [*target, *ranks]
    except MIRError as error:
        parser.error(str(error))


def attach_before_training(probe: Probe, options: dict[str, Any]) -> list[Any]:
    """Make Trainer.train attach MIR first unless the Trainer has it; returns the list its callbacks are added to."""
    from transformers import Trainer

    from mir_callback.integrations.huggingface import MIRCallback, attach_mir

    attached: list[Any] = []
    trainer_class: Any = Trainer
    original = trainer_class.train

    def train(trainer: Any, *args: Any, **keywords: Any) -> Any:
        found = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, MIRCallback)]
        attached.extend(found or [attach_mir(trainer, probe, **options)])
        return original(trainer, *args, **keywords)

    trainer_class.train = train
    return attached


def _check_trained(attached: list[Any], target: list[str]) -> None:
    if not attached:
        name = " ".join(target[: 2 if target[0] == "-m" else 1])
        log.warning("no MIR was measured: %s ended without training a transformers Trainer in this process", name)


def _explain(error: Exception) -> None:
    """Log a hint if the error is a known one of LLaVA's code bases with unsupported package versions."""
    with suppress(ImportError):
        hint = importlib.import_module("llava_integration.common").explain(error)
        if hint is not None:
            log.warning("%s", hint)


if __name__ == "__main__":
    main(sys.argv[1:])
