# SPDX-License-Identifier: Apache-2.0
"""Run an unmodified training script or command with MIR attached to the Trainer that trains in it.

`python -m mir_callback.launch --help` shows how.
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from transformers import HfArgumentParser

from mir_callback.config import FLAG_GROUPS, MIRArguments
from mir_callback.console import log
from mir_callback.errors import ConfigError, MIRError
from mir_callback.on_start.sitecustomize import start
from mir_callback.probe.processors import load_processor

PROGRAM = "python -m mir_callback.launch"
SEPARATOR = "--"
_PATHS = ("mir_probe", "mir_images", "mir_texts", "mir_processor")
USAGE = f"""{PROGRAM} FLAGS -- WHAT ITS ARGUMENTS
       torchrun --nproc_per_node 8 -m mir_callback.launch FLAGS -- WHAT ITS ARGUMENTS
       deepspeed --module mir_callback.launch FLAGS -- WHAT ITS ARGUMENTS"""
DESCRIPTION = """Run unmodified training code with MIR attached to its Trainer.

Before the -- are the flags below, after it is what to run with its own arguments: a Python script, -m and a module,
or a command. What is written in Python runs in this process, as Python would run it. MIR is attached in the
processes that train, this one or those that are started."""
EXAMPLE = f"""examples:
  {PROGRAM} --mir_images textvqa/val --mir_texts cnn/stories --mir_every 50 -- \\
      llava/train/train_mem.py --model_name_or_path lmsys/vicuna-7b-v1.5 --version plain ...
  {PROGRAM} --mir_probe probe.zip -- llamafactory-cli train pretrain.yaml
  {PROGRAM} --mir_probe probe.zip -- accelerate launch --num_processes 8 train.py ..."""


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
    """The command line after the separator; a command is replaced by its file. ConfigError if there is none."""
    if not words or words == ["-m"]:
        raise ConfigError(f"Nothing to run after {SEPARATOR}: name a {'module' if words else 'script'}.")
    if words[0] == "-m":
        return words
    file = words[0] if os.path.isfile(words[0]) else shutil.which(words[0])
    if file is None:
        raise ConfigError(f"{words[0]} (after {SEPARATOR}) is neither a file nor a command on the PATH.")
    if not is_python(file) and not os.access(file, os.X_OK):
        raise ConfigError(f"{file} is neither a Python script nor executable. Is it a shell script? Then: bash {file}")
    return [file, *words[1:]]


def is_python(file: str) -> bool:
    """Whether a file is a Python script, or a console command written in Python."""
    # The first line of an installed command names its Python, or the second if the path is long.
    with open(file, "rb") as opened:
        first, second = opened.readline(1000), opened.readline(1000)
    named = second if second.startswith(b"'''exec'") else first
    return file.endswith(".py") or (first.startswith(b"#!") and b"python" in named)


def run(target: list[str]) -> None:
    """Run a script, or a module after -m, in this process as Python would; any other command as a process."""
    if target[0] == "-m":
        sys.argv = target[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(target[1], run_name="__main__", alter_sys=True)
    elif not is_python(target[0]):
        raise SystemExit(run_process(target))
    else:
        sys.argv = target
        sys.path.insert(0, str(Path(target[0]).resolve().parent))
        runpy.run_path(target[0], run_name="__main__")


def run_process(target: list[str]) -> int:
    """Run a command; its exit code as a shell has it. SIGTERM, by which cluster managers end a job, goes on to it."""
    with subprocess.Popen(target) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            code = process.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
    return code if code >= 0 else 128 - code


def main(words: list[str]) -> None:
    """Parse the flags before `--`, then run what follows it.

    Exits with status 2 and one line on stderr if a flag is invalid or there is nothing to run; else as what was run.
    """
    arguments, target = read_command_line(words)
    with TemporaryDirectory(prefix="mir-launch-", ignore_cleanup_errors=True) as notes:
        start(vars(arguments), notes)
        try:
            run(target)
        except Exception as error:
            _explain(error)
            raise
        finally:
            if os.path.isdir(notes) and not os.listdir(notes):  # after weeks something may have cleaned up
                log.warning(
                    "no MIR was measured: %s ended without training a transformers Trainer, in this process or in one "
                    "that it started. A training loop of its own needs MIRMonitor, see docs/integrations.md",
                    " ".join(target[: 2 if target[0] == "-m" else 1]),
                )


def read_command_line(words: list[str]) -> tuple[Any, list[str]]:
    """The launcher's flags, with absolute paths, and the command to run; exits on errors and after `--help`."""
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
        arguments = MIRArguments(**{name: _from_anywhere(name, value) for name, value in vars(values).items()})
        # Both are read now too, so that errors show before anything starts.
        arguments.probe_source().load()
        if arguments.mir_processor is not None:
            load_processor(arguments.mir_processor)
        return arguments, [*target, *ranks]
    except MIRError as error:
        parser.error(str(error))


def _from_anywhere(flag: str, value: Any) -> Any:
    """The value of a flag; a path made absolute, as processes that are started may have another working directory."""
    is_path = flag in _PATHS and value is not None and os.path.exists(os.path.expanduser(value))
    return os.path.abspath(os.path.expanduser(value)) if is_path else value


def _explain(error: Exception) -> None:
    """Log a hint if the error is a known one of LLaVA's code bases with unsupported package versions."""
    with suppress(ImportError):
        hint = importlib.import_module("llava_integration.common").explain(error)
        if hint is not None:
            log.warning("%s", hint)


if __name__ == "__main__":
    main(sys.argv[1:])
