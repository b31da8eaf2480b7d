# SPDX-License-Identifier: Apache-2.0
"""The live model: where its decoder is, which positions are vision, and how to look without leaving a trace."""
