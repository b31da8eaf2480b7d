# SPDX-License-Identifier: Apache-2.0
"""The real `tinyllava/train/train.py` on a CPU, otherwise untouched; see benchmarks/notes/integrations.md."""

import importlib.util
import runpy

import torch

from tests.llava.tinyllava_checkout import help_on_cpu, help_on_newer_python

if __name__ == "__main__":
    help_on_newer_python()
    help_on_cpu()
    torch.manual_seed(3)  # the script sets none before it makes its connector
    found = importlib.util.find_spec("tinyllava.train.train")
    assert found is not None
    assert found.origin is not None
    runpy.run_path(found.origin, run_name="__main__")
