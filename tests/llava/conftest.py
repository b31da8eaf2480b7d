# SPDX-License-Identifier: Apache-2.0
"""The real LLaVA package's own environment, and tiny assets made in it."""

import os
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, run_process

PYTHON = Path(os.environ.get("MIR_LLAVA_PYTHON", ROOT / ".venv-llava" / "bin" / "python"))


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    assert PYTHON.exists(), f"no LLaVA environment at {PYTHON}; `make test` builds it (or set MIR_LLAVA_PYTHON)"
    folder = tmp_path_factory.mktemp("assets")
    made = run_process(["-m", "tests.llava.assets", str(folder)], python=PYTHON)
    assert made.returncode == 0, made.stderr
    return folder
