# SPDX-License-Identifier: Apache-2.0
"""Reads and compares histories; needs no model."""
