# SPDX-License-Identifier: Apache-2.0
"""The live model: its decoder layers, its vision positions, capturing hidden states, restoring its state."""
