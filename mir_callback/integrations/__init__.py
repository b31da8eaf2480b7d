# SPDX-License-Identifier: Apache-2.0
"""Who drives the training loop."""
