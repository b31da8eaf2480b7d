# SPDX-License-Identifier: Apache-2.0
"""Works on histories, never on a model."""
