# SPDX-License-Identifier: Apache-2.0
"""What Python runs first in every process of a launched run: this folder stands on their PYTHONPATH."""
