# SPDX-License-Identifier: Apache-2.0
"""From forwards on every rank to the distance of every layer."""
