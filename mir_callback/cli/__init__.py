# SPDX-License-Identifier: Apache-2.0
"""The `mir` command: reads the subcommand and hands over to its file in `commands`."""

from __future__ import annotations

import io
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence

from mir_callback.cli import compare, probe, report
from mir_callback.cli import eval as evaluate
from mir_callback.errors import MIRError

_CLOSED = 141  # as of a program that a closed pipe ends
COMMANDS = {"probe": probe, "eval": evaluate, "compare": compare, "report": report}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        arguments: the command line without the program's name; by default that of this process.

    Returns:
        Exit status: 0, or 2 after an error, which is told in one line, or 141 where nobody reads on. (Usage errors
        exit with 2 by themselves.)
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what a terminal's encoding lacks must not end a command
    options = _parser().parse_args(arguments)
    try:
        COMMANDS[options.command].run(options)
        sys.stdout.flush()
    except MIRError as error:
        print(f"mir {options.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mir {options.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would flush into the pipe once more
        return _CLOSED
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser("mir", description="MIR, the Modality Integration Rate, from the command line.")
    parser.add_argument("--version", action="version", version=f"mir-callback {sys.modules[__package__].__version__}")
    subcommands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subcommands.add_parser(
            name,
            help=command.HELP,
            description=f"{command.HELP[0].upper()}{command.HELP[1:]}.",
            epilog=command.EPILOG,
            formatter_class=RawDescriptionHelpFormatter,
        )
        command.add_flags(subparser)
    return parser
