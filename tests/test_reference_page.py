# SPDX-License-Identifier: Apache-2.0
"""docs/reference.md is what the code says."""

import importlib.util
from pathlib import Path

GENERATOR = Path(__file__).parents[1] / "docs" / "generate.py"


def test_the_page_is_written_from_the_code_as_it_is():
    spec = importlib.util.spec_from_file_location("generate", GENERATOR)
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.PAGE.read_text(encoding="utf-8") == generate.page(), "run `make docs`"
