# SPDX-License-Identifier: Apache-2.0
"""Checkpoints on disk: find, load and evaluate them, and store their values."""
