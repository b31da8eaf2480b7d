# SPDX-License-Identifier: Apache-2.0
"""The `mir` command, run in the test's own process."""

from mir_callback.cli import main


def run_command(command, capsys, *arguments):
    """Exit status, and what was said on either stream."""
    status = main([command, *map(str, arguments)])
    said = capsys.readouterr()
    return status, said.out, said.err
