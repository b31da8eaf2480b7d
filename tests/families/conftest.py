# SPDX-License-Identifier: Apache-2.0
"""Image processors of some families need torchvision, where it is installed."""

from tests.families.torchvision_ops import load_torchvision

load_torchvision()
