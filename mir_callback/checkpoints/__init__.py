# SPDX-License-Identifier: Apache-2.0
"""Models on disk: which checkpoints there are, how each is opened, and their values in a history file."""
