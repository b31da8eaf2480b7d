# SPDX-License-Identifier: Apache-2.0
"""The `mir` command; imports only the module of the subcommand that is run."""

from __future__ import annotations

import io
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module

import mir_callback
from mir_callback.errors import MIRError
from mir_callback.fs import printable

COMMANDS = {
    "probe": "build, inspect and save a probe, the fixed samples that MIR is measured on",
    "eval": "measure MIR of saved models, or of every checkpoint of a run",
    "compare": "rank runs by MIR, as far as noise allows, and show where each could have stopped",
    "report": "write an HTML page about runs: MIR and loss, layers, cost, samples, how it was measured",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of this process.

    Returns:
        Exit status: 0, 2 after an error (one line on stderr), 130 after Ctrl-C, 141 if the output pipe was closed.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # the terminal's encoding may lack a character
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _make_parser(words).parse_args(words)
    try:
        options.run(options)
        sys.stdout.flush()
    except MIRError as error:
        print(f"mir {options.command}: error: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mir {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would flush to the pipe again
        return 141  # the exit code of a program that SIGPIPE ended
    except OSError as error:  # a folder that may not be read, a name that is too long: its message names the file
        print(f"mir {options.command}: error: {printable(str(error))}", file=sys.stderr)
        return 2
    return 0


def _make_parser(words: Sequence[str]) -> ArgumentParser:
    parser = ArgumentParser("mir", description="The Modality Integration Rate (MIR) on the command line.")
    parser.add_argument("--version", action="version", version=f"mir-callback {mir_callback.__version__}")
    subcommands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = next((word for word in words if not word.startswith("-")), None)
    for name, does in COMMANDS.items():
        subparser = subcommands.add_parser(name, help=does, formatter_class=RawDescriptionHelpFormatter)
        if name == wanted:
            command = import_module(f"{__name__}.{name}")
            subparser.description, subparser.epilog = f"{does[0].upper()}{does[1:]}.", command.EPILOG
            subparser.set_defaults(run=command.run)
            command.add_flags(subparser)
    return parser
