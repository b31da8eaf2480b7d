# SPDX-License-Identifier: Apache-2.0
"""The fixed samples a run is measured with, and how they become model inputs."""
