# SPDX-License-Identifier: Apache-2.0
"""What the `mir` command does: one file a subcommand, each with its flags and what they lead to."""
