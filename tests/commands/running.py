# SPDX-License-Identifier: Apache-2.0
"""The `mir` command, run in the test's own process."""

from mir_callback.cli import main


def messages_of(error, command):
    """The lines of stderr that the command itself wrote, and not a progress bar."""
    return [line for line in error.splitlines() if line.startswith(f"mir {command}: ")]


def run_command(command, capsys, *arguments):
    """Exit status, and what was said on either stream."""
    status = main([command, *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err
