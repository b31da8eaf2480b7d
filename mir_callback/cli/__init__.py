# SPDX-License-Identifier: Apache-2.0
"""The `mir` command: imports the file of the subcommand that is wanted, and nothing of the others."""

from __future__ import annotations

import io
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module

import mir_callback
from mir_callback.errors import MIRError

COMMANDS = {
    "probe": "build, look at and save a probe: the fixed samples that MIR is measured on",
    "eval": "measure finished models, or every checkpoint of a run",
    "compare": "compare runs by their MIR: rank them as far as noise allows, and say where each could have stopped",
    "report": "make one HTML page of runs: MIR and loss, layers, cost, samples, how it was measured",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand of a command line, by default of this process.

    Returns:
        Exit status: 0, or 2 after an error, which is said in one line, 130 after Ctrl-C, or 141 where nobody reads on.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal's encoding lacks must not end a command
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _make_parser(words).parse_args(words)
    try:
        options.run(options)
        sys.stdout.flush()
    except MIRError as error:
        print(f"mir {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mir {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would flush into the pipe once more
        return 141  # as of a program that a closed pipe ends
    return 0


def _make_parser(words: Sequence[str]) -> ArgumentParser:
    parser = ArgumentParser("mir", description="MIR, the Modality Integration Rate, from the command line.")
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
