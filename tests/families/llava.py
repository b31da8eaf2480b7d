# SPDX-License-Identifier: Apache-2.0
"""LLaVA and its descendants in transformers."""

from tests import tiny_models
from tests.families.registry import Family

FAMILIES = [
    Family("llava", tiny_models.llava, "<image>{text}", short=True),
]
