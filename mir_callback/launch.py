# SPDX-License-Identifier: Apache-2.0
"""Run an unmodified training script or command with MIR attached to the Trainer that trains in it.

`python -m mir_callback.launch --help` shows how.
"""

from __future__ import annotations

import argparse
import importlib
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
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
or a command. A script, a module and a command of this Python run in this process, as Python would run them. MIR is
attached in the processes that train, this one or those that are started."""
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
    """Whether a file is a Python script, or a console command of this Python and no other's."""
    # The first line of an installed command names its Python, or the second if the path is long.
    with open(file, "rb") as opened:
        first, second = os.fsdecode(opened.readline(1000)), os.fsdecode(opened.readline(1000))
    if second.startswith("'''exec'"):
        named = shlex.split(second)[1:]
    else:
        named = first[2:].split() if first.startswith("#!") else []
    if named and os.path.basename(named[0]) == "env":
        named = [shutil.which(word) or "" for word in named[1:] if not word.startswith("-") and "=" not in word]
    return file.endswith(".py") or bool(named and named[0] and _is_this_python(named[0]))


def _is_this_python(file: str) -> bool:
    # Environments share one Python by links: the folder tells them apart, its `python` and `python3` are the same.
    def resolve(path: str) -> tuple[str, str]:
        return os.path.realpath(os.path.dirname(path)), os.path.realpath(path)

    return resolve(file) == resolve(sys.executable)


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
    """Run a command; its exit code as a shell has it.

    The signals by which cluster managers end a job, or ask it for a checkpoint, go on to the command. Ctrl-C reaches it
    by itself: this process waits until it has ended.
    """
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, _: Any) -> None:
        if number == signal.SIGINT:
            return
        if process is None:
            early.append(number)
        else:
            process.send_signal(number)

    wanted = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
    # What is ignored stays so, as nohup wants it: the command inherits that, but no handler.
    before = {each: signal.signal(each, forward) for each in wanted if signal.getsignal(each) != signal.SIG_IGN}
    try:
        # The absolute path, as a name without a slash would be looked up on the PATH.
        process = subprocess.Popen([os.path.abspath(target[0]), *target[1:]])
        for number in early:
            process.send_signal(number)
        code = process.wait()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    return code if code >= 0 else 128 - code


def main(words: list[str]) -> None:
    """Parse the flags before `--`, then run what follows it.

    Exits with status 2 and one line on stderr if a flag is invalid or there is nothing to run; else as what was run.
    """
    arguments, target = read_command_line(words)
    launcher, notes = os.getpid(), mkdtemp(prefix="mir-launch-")
    try:
        start(vars(arguments), notes)
        run(target)
    except Exception as error:
        _explain(error)
        raise
    finally:
        if os.getpid() == launcher:  # a process that the script has forked ends here too
            _read_notes(Path(notes), " ".join(target[: 2 if target[0] == "-m" else 1]))
            shutil.rmtree(notes, ignore_errors=True)


def _read_notes(folder: Path, what: str) -> None:
    """Warn if nothing was measured, and of each training that was not."""
    if not folder.is_dir():  # after weeks something may have cleaned up
        return
    notes = [each.read_text() for each in folder.iterdir()]
    if not notes:
        log.warning(
            "no MIR was measured: %s ended without training a transformers Trainer, in this process or in one that it "
            "started. A training loop of its own needs MIRMonitor, see docs/integrations.md",
            what,
        )
    for line in sorted({line for note in notes for line in note.splitlines()}):
        log.warning("no MIR was measured in a training of %s: %s", what, line)


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
