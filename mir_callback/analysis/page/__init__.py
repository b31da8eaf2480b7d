# SPDX-License-Identifier: Apache-2.0
"""What the page of `mir report` is made of: runs in, parts of an HTML page out. Nothing here reads a run's files."""
